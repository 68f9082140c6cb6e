// Making a program of PTX: statements, scopes and names (parser.cpp), and instructions (decode.cpp).
#pragma once

#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

class Parser {
public:
    // Fills an empty program.
    explicit Parser(Program& program) : program_(program) {}
    void parse(const std::string& ptx);

private:
    // What is declared between braces.
    struct Scope {
        int parent;
        std::map<std::string, int> registers;
        // Of ".reg .b32 %r<5>": "%r" and 5.
        std::map<std::string, int> families;
        std::map<std::string, u32> labels;
    };
    // A branch whose label may come later.
    struct OpenTarget {
        u32 instruction;
        size_t index;
        int scope;
        std::string label;
    };

    // Statements and names.
    std::string without_comments(const std::string& ptx);
    void read_file_names(const std::string& line);
    void read_shared_arrays(const std::string& text);
    void read_parameters(const std::string& list);
    void read_launch_bounds(const std::string& directives);
    void read_body(const std::string& text, size_t at);
    size_t end_of_statement(const std::string& text, size_t at, bool& is_label) const;
    void directive(const std::string& statement);
    void declare_registers(const std::string& statement);
    void resolve_targets();
    int new_register() { return program_.num_registers++; }
    int constant(u64 value);
    int find_register(const std::string& name);
    [[noreturn]] void refuse(const std::string& why) const;

    // Operands.
    int operand(const std::string& text, Type type = Type::None);
    int number(const std::string& text, Type type);
    Address address(const std::string& text);
    std::vector<int> register_list(const std::string& text, Type type = Type::None);

    // Instructions. The decoders read `modifiers_` and `operands_`, and fill `instruction_`.
    void instruction(const std::string& statement);
    void decode(const std::string& name);
    bool has(const std::string& modifier) const;
    bool has_prefix(const std::string& beginning) const;
    const std::string& text_of(size_t index) const;
    bool decode_simple(const std::string& name);
    void decode_compare();
    void decode_move();
    void decode_memory(bool is_store);
    void decode_branch(const std::string& name);
    void decode_named_barrier();
    void decode_mbarrier();
    void decode_copy();
    void decode_shuffle();
    void decode_elect();
    void decode_wgmma();
    void decode_wgmma_product();
    void decode_matrix(bool is_store);
    void decode_set_registers();
    void add_target(const std::string& label);

    Program& program_;
    std::vector<Scope> scopes_;
    int scope_ = -1;
    int line_ = 1, location_ = 0;
    std::string last_label_;
    std::vector<OpenTarget> open_targets_;
    // Labels of .branchtargets.
    std::map<std::string, std::vector<std::string>> branch_tables_;
    std::map<u64, int> constant_registers_;
    // Offsets of parameters and addresses of arrays in shared memory.
    std::map<std::string, u64> symbols_;
    Instruction instruction_;
    std::vector<std::string> modifiers_, operands_;
};

}  // namespace ptx
