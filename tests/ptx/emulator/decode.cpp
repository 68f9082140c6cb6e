// Instructions of PTX: names, modifiers and operands. An instruction that is not here is refused, as its meaning is not known.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>

#include "parser.h"
#include "text.h"

namespace ptx {

// ---------------------------------------------------------------- operands

int Parser::operand(const std::string& text, Type type) {
    if (text == "_") {
        return NO_REGISTER;
    }
    int place = find_register(text);
    if (place != NO_REGISTER) {
        return place;
    }
    auto symbol = symbols_.find(text);
    if (symbol != symbols_.end()) {
        return constant(symbol->second);
    }
    return number(text, type);
}

// A constant. 0f3F800000 are the bits of a float.
int Parser::number(const std::string& text, Type type) {
    if (starts_with(text, "0f") || starts_with(text, "0F")) {
        return constant(strtoul(text.c_str() + 2, nullptr, 16));
    }
    if (text.empty() || (text[0] != '-' && !isdigit(static_cast<unsigned char>(text[0])))) {
        refuse("unknown operand '" + text + "'");
    }
    bool negative = text[0] == '-';
    u64 value = strtoull(text.c_str() + negative, nullptr, 0);
    value = negative ? 0 - value : value;
    if (type == Type::Predicate) {
        value = value != 0;
    } else if (type != Type::None) {
        value &= mask_of(type);
    }
    return constant(value);
}

// "[%rd1+16]"
Address Parser::address(const std::string& text) {
    if (text.size() < 3 || text[0] != '[') {
        refuse("not an address: " + text);
    }
    std::string inner = text.substr(1, text.size() - 2);
    size_t sign = inner.find_first_of("+-", 1);
    Address result;
    result.base = operand(trimmed(inner.substr(0, sign)));
    if (sign != std::string::npos) {
        result.offset = strtoll(trimmed(inner.substr(sign + 1)).c_str(), nullptr, 0);
        result.offset = inner[sign] == '-' ? -result.offset : result.offset;
    }
    return result;
}

// "{%r1, %r2}" or "%r1"
std::vector<int> Parser::register_list(const std::string& text, Type type) {
    std::string inner = text[0] == '{' ? text.substr(1, text.size() - 2) : text;
    std::vector<int> places;
    for (const std::string& part : split(inner, ',')) {
        places.push_back(operand(part, type));
    }
    return places;
}

bool Parser::has(const std::string& modifier) const {
    return std::find(modifiers_.begin(), modifiers_.end(), modifier) != modifiers_.end();
}

bool Parser::has_prefix(const std::string& beginning) const {
    return std::any_of(modifiers_.begin(), modifiers_.end(),
                       [&](const std::string& modifier) { return starts_with(modifier, beginning); });
}

const std::string& Parser::text_of(size_t index) const {
    if (index >= operands_.size()) {
        refuse("operands are missing: " + instruction_.text);
    }
    return operands_[index];
}

// ---------------------------------------------------------------- instructions

// "@%p1 name.modifier.modifier operand, operand"
void Parser::instruction(const std::string& statement) {
    instruction_ = Instruction();
    instruction_.line = line_;
    instruction_.location = location_;
    std::string text = on_one_line(statement);
    instruction_.text = text.size() > 150 ? text.substr(0, 150) + "..." : text;
    if (text[0] == '@') {
        size_t end = text.find(' ');
        instruction_.predicate_negated = text[1] == '!';
        size_t first = instruction_.predicate_negated ? 2 : 1;
        instruction_.predicate = operand(text.substr(first, end - first));
        text = text.substr(end + 1);
    }
    size_t end = std::min(text.find(' '), text.size());
    modifiers_ = split(text.substr(0, end), '.');
    std::string name = modifiers_[0];
    modifiers_.erase(modifiers_.begin());
    operands_ = split(text.substr(end), ',');
    std::vector<Type> types;
    for (const std::string& modifier : modifiers_) {
        if (modifier == "shared" || starts_with(modifier, "shared::")) {
            instruction_.space = Space::Shared;
        } else if (modifier == "global" && instruction_.space != Space::Shared) {
            instruction_.space = Space::Global;
        } else if (modifier == "param") {
            instruction_.space = Space::Parameter;
        }
        if (type_named(modifier) != Type::None) {
            types.push_back(type_named(modifier));
        }
    }
    // With two types, the first is that of the result.
    if (!types.empty()) {
        instruction_.type = types.size() > 1 ? types[types.size() - 2] : types[0];
        instruction_.source_type = types.back();
    }
    instruction_.flushes = has("ftz");
    instruction_.waits_for_lanes = has("sync") || has("warp") || has("aligned");
    // One program makes no cluster. Scopes such as that of fence.acq_rel.cluster mean no more than its own program then.
    if ((starts_with(name, "barrier") && has("cluster")) || has_prefix("multicast") || name == "mapa") {
        refuse("clusters are not emulated: " + instruction_.text);
    }
    decode(name);
    program_.code.push_back(instruction_);
}

// Instructions whose operands are a destination and some sources of the instruction's type.
bool Parser::decode_simple(const std::string& name) {
    struct Simple {
        Op op;
        int sources;
    };
    static const std::map<std::string, Simple> simple = {
        {"add", {Op::Add, 2}},         {"sub", {Op::Sub, 2}},          {"mul", {Op::Mul, 2}},
        {"mul.hi", {Op::MulHigh, 2}},  {"mul.wide", {Op::MulWide, 2}}, {"mad", {Op::Mad, 3}},
        {"fma", {Op::Fma, 3}},         {"div", {Op::Div, 2}},          {"rem", {Op::Rem, 2}},
        {"neg", {Op::Neg, 1}},         {"min", {Op::Min, 2}},          {"max", {Op::Max, 2}},
        {"and", {Op::And, 2}},         {"or", {Op::Or, 2}},            {"xor", {Op::Xor, 2}},
        {"not", {Op::Not, 1}},         {"shl", {Op::ShiftLeft, 2}},    {"shr", {Op::ShiftRight, 2}},
        {"cvt", {Op::Convert, 1}},     {"lop3", {Op::Lop3, 3}},        {"prmt", {Op::Permute, 3}},
        {"bfe", {Op::ExtractBits, 3}}, {"ex2", {Op::Exp2, 1}},         {"cvta", {Op::ToGeneric, 1}},
        {"cvta.to", {Op::FromGeneric, 1}}, {"selp", {Op::Select, 3}},  {"mad.wide", {Op::MadWide, 3}},
        {"abs", {Op::Abs, 1}},         {"rsqrt", {Op::InverseRoot, 1}},
    };
    std::string key = name;
    for (const char* variant : {"hi", "wide", "to"}) {
        key += has(variant) ? std::string(".") + variant : "";
    }
    auto found = simple.find(key);
    if (found == simple.end()) {
        return false;
    }
    instruction_.op = found->second.op;
    size_t count = found->second.sources;
    if (instruction_.op == Op::Convert && operands_.size() == 3) {
        count = 2;  // cvt.bf16x2.f32 makes two numbers of two.
    }
    bool saturates = has("satfinite") && instruction_.type != Type::E4M3X2;  // Conversions to e4m3 always do.
    if (instruction_.op == Op::Lop3) {
        instruction_.number = static_cast<int>(strtoul(text_of(4).c_str(), nullptr, 0));
    } else if (operands_.size() != count + 1 || has("sat") || saturates || has("NaN") || has("relu")) {
        refuse("not emulated: " + instruction_.text);
    }
    instruction_.d = operand(text_of(0));
    int* sources[] = {&instruction_.a, &instruction_.b, &instruction_.c};
    for (size_t i = 0; i < count; i++) {
        *sources[i] = operand(text_of(i + 1), instruction_.source_type);
    }
    if (instruction_.op == Op::MadWide) {
        instruction_.c = operand(text_of(3), Type::B64);
    }
    return true;
}

void Parser::decode(const std::string& name) {
    // Hints, and orders that the machine keeps anyhow.
    static const std::vector<std::string> without_effect = {"membar", "nanosleep", "prefetch", "pmevent", "discard"};
    if (decode_simple(name)) {
        return;
    }
    if (name == "setp") {
        decode_compare();
    } else if (name == "mov") {
        decode_move();
    } else if (name == "ld" || name == "st") {
        decode_memory(name == "st");
    } else if (name == "bra" || name == "brx") {
        decode_branch(name);
    } else if (name == "ret" || name == "exit") {
        instruction_.op = Op::Return;
    } else if (name == "bar" || name == "barrier") {
        decode_named_barrier();
    } else if (name == "elect") {
        decode_elect();
    } else if (name == "shfl") {
        decode_shuffle();
    } else if (name == "mbarrier") {
        decode_mbarrier();
    } else if (name == "cp") {
        decode_copy();
    } else if (name == "fence") {
        instruction_.op = has("proxy") && has_prefix("async") ? Op::ProxyFence : Op::Nop;
    } else if (name == "griddepcontrol") {
        instruction_.op = has("wait") ? Op::GridWait : Op::Nop;
        program_.waits_for_grid = program_.waits_for_grid || has("wait");
    } else if (name == "setmaxnreg") {
        decode_set_registers();
    } else if (name == "wgmma") {
        decode_wgmma();
    } else if (name == "ldmatrix" || name == "stmatrix") {
        decode_matrix(name == "stmatrix");
    } else if (std::count(without_effect.begin(), without_effect.end(), name) == 0) {
        refuse("not emulated: " + instruction_.text);
    }
}

void Parser::decode_compare() {
    static const std::map<std::string, Comparison> comparisons = {
        {"eq", Comparison::Equal},   {"ne", Comparison::NotEqual},        {"lt", Comparison::Less},
        {"le", Comparison::LessOrEqual}, {"gt", Comparison::Greater},     {"ge", Comparison::GreaterOrEqual},
        {"num", Comparison::OrderedPair}, {"nan", Comparison::UnorderedPair},
    };
    instruction_.op = Op::Compare;
    std::string name = modifiers_.at(0);
    // For floats, "leu" is true for NaN too. For integers, "lo", "ls", "hi" and "hs" are not used by the compiler.
    if (name.size() == 3 && name[2] == 'u') {
        instruction_.or_unordered = true;
        name = name.substr(0, 2);
    }
    auto found = comparisons.find(name);
    if (found == comparisons.end() || operands_.size() != 3) {
        refuse("not emulated: " + instruction_.text);
    }
    instruction_.comparison = found->second;
    std::vector<std::string> results = split(text_of(0), '|');
    instruction_.d = operand(results[0]);
    if (results.size() > 1) {
        if (instruction_.type != Type::BF16X2) {  // For one number, the second result is the opposite of the first.
            refuse("not emulated: " + instruction_.text);
        }
        instruction_.second_d = operand(results[1]);
    }
    instruction_.a = operand(text_of(1), instruction_.type);
    instruction_.b = operand(text_of(2), instruction_.type);
}

// Between registers, or between one and several that are its parts.
void Parser::decode_move() {
    if (text_of(0)[0] == '{') {
        instruction_.op = Op::Unpack;
        instruction_.registers = register_list(text_of(0));
        instruction_.a = operand(text_of(1), instruction_.type);
    } else if (text_of(1)[0] == '{') {
        instruction_.op = Op::Pack;
        instruction_.d = operand(text_of(0));
        instruction_.registers = register_list(text_of(1));
    } else {
        instruction_.op = Op::Move;
        instruction_.d = operand(text_of(0));
        instruction_.a = operand(text_of(1), instruction_.type);
    }
}

void Parser::decode_memory(bool is_store) {
    instruction_.op = is_store ? Op::Store : Op::Load;
    instruction_.address = address(text_of(is_store ? 0 : 1));
    instruction_.registers = register_list(text_of(is_store ? 1 : 0), is_store ? instruction_.type : Type::None);
    size_t expected = has("v8") ? 8 : has("v4") ? 4 : has("v2") ? 2 : 1;
    if (instruction_.registers.size() != expected || has("local") || has("const")) {
        refuse("not emulated: " + instruction_.text);
    }
}

void Parser::add_target(const std::string& label) {
    instruction_.targets.push_back(0);
    u32 own = static_cast<u32>(program_.code.size());
    open_targets_.push_back({own, instruction_.targets.size() - 1, scope_, label});
}

void Parser::decode_branch(const std::string& name) {
    if (name == "bra") {
        instruction_.op = Op::Branch;
        add_target(text_of(0));
        return;
    }
    instruction_.op = Op::BranchIndexed;
    instruction_.a = operand(text_of(0));
    auto table = branch_tables_.find(text_of(1));
    if (table == branch_tables_.end()) {
        refuse("a branch without a table: " + instruction_.text);
    }
    for (const std::string& label : table->second) {
        add_target(label);
    }
}

}  // namespace ptx
