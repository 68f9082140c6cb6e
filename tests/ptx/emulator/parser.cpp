// Statements of PTX: comments, directives, scopes, labels and names. decode.cpp reads the instructions.
#include "parser.h"

#include <cctype>
#include <cstdio>
#include <cstdlib>

#include "text.h"

namespace ptx {

Program parse(const std::string& ptx) {
    Program program;
    Parser(program).parse(ptx);
    return program;
}

void Parser::refuse(const std::string& why) const {
    throw Fault(format("PTX line %d: %s", line_, why.c_str()));
}

void Parser::parse(const std::string& ptx) {
    std::string text = without_comments(ptx);
    size_t entry = text.find(".entry");
    if (entry == std::string::npos) {
        throw Fault("the PTX has no .entry");
    }
    read_shared_arrays(text.substr(0, entry));
    size_t list = text.find('(', entry);
    size_t body = text.find('{', entry);
    size_t name = entry + std::string(".entry").size();
    if (list < body) {
        size_t end = text.find(')', list);
        program_.name = trimmed(text.substr(name, list - name));
        read_parameters(text.substr(list + 1, end - list - 1));
        read_launch_bounds(text.substr(end, body - end));
    } else {
        program_.name = trimmed(text.substr(name, body - name));
        read_launch_bounds(text.substr(name, body - name));
    }
    for (size_t at = 0; at < body; at++) {
        line_ += text[at] == '\n';
    }
    read_body(text, body);
    instruction_ = Instruction();
    instruction_.op = Op::Return;
    instruction_.text = "(end)";
    instruction_.line = line_;
    program_.code.push_back(instruction_);
    resolve_targets();
}

// Lines stay lines, so that they can be counted. A .loc has no semicolon: it gets one, and becomes a statement.
std::string Parser::without_comments(const std::string& ptx) {
    std::string text;
    size_t at = 0;
    while (at < ptx.size()) {
        size_t end = std::min(ptx.find('\n', at), ptx.size());
        std::string line = trimmed(ptx.substr(at, end - at));
        if (starts_with(line, ".file")) {
            read_file_names(line);
            line.clear();
        }
        line = trimmed(line.substr(0, line.find("//")));
        if (starts_with(line, ".loc")) {
            line = line.substr(0, line.find(',')) + ";";
        }
        text += line + "\n";
        at = end + 1;
    }
    return text;
}

void Parser::read_file_names(const std::string& line) {
    size_t number = strtoul(line.c_str() + std::string(".file").size(), nullptr, 10);
    size_t first = line.find('"');
    size_t last = line.rfind('"');
    if (program_.files.size() <= number) {
        program_.files.resize(number + 1);
    }
    if (first != std::string::npos) {
        std::string path = line.substr(first + 1, last - first - 1);
        program_.files[number] = path.substr(path.rfind('/') + 1);
    }
}

// Arrays outside the kernel. One without a size begins where the shared memory of the launch begins.
void Parser::read_shared_arrays(const std::string& text) {
    for (const std::string& statement : split(text, ';')) {
        size_t found = statement.find(".shared");
        if (found == std::string::npos) {
            continue;
        }
        size_t bracket = statement.find('[', found);
        size_t first = statement.find_last_of(" \t", bracket) + 1;
        std::string name = statement.substr(first, bracket - first);
        if (atoi(statement.c_str() + bracket + 1) > 0) {
            throw Fault("arrays in shared memory that have a size are not emulated: " + statement);
        }
        symbols_[name] = SHARED_BASE;
    }
}

// PTX ISA, "Parameter State Space". Each parameter is aligned to its .align, or to its size.
void Parser::read_parameters(const std::string& list) {
    int offset = 0;
    for (const std::string& text : split(list, ',')) {
        std::vector<std::string> words = split(on_one_line(text), ' ');
        Parameter parameter;
        parameter.name = words.back();
        parameter.size = 0;
        int alignment = 0;
        for (size_t i = 0; i < words.size(); i++) {
            if (words[i] == ".align" && parameter.size == 0) {
                alignment = atoi(words[i + 1].c_str());
            }
            Type type = words[i][0] == '.' ? type_named(words[i].substr(1)) : Type::None;
            if (type != Type::None && parameter.size == 0) {
                parameter.size = size_of(type);
            }
        }
        size_t bracket = parameter.name.find('[');
        if (bracket != std::string::npos) {
            parameter.size *= atoi(parameter.name.c_str() + bracket + 1);
            parameter.name = parameter.name.substr(0, bracket);
        }
        // A pointer's ".ptr .align" says how its target is aligned, not the parameter.
        alignment = alignment > 0 ? alignment : parameter.size;
        offset = (offset + alignment - 1) / alignment * alignment;
        parameter.offset = offset;
        offset += parameter.size;
        symbols_[parameter.name] = parameter.offset;
        program_.parameters.push_back(parameter);
    }
    program_.parameter_bytes = offset;
}

void Parser::read_launch_bounds(const std::string& directives) {
    auto value = [&](const std::string& name) {
        size_t found = directives.find(name);
        return found == std::string::npos ? 0 : atoi(directives.c_str() + found + name.size());
    };
    program_.threads = value(".reqntid");
    program_.registers_at_start = value(".maxnreg");
    if (directives.find("cluster") != std::string::npos) {
        throw Fault("clusters are not emulated: " + on_one_line(directives));
    }
}

void Parser::read_body(const std::string& text, size_t at) {
    do {
        if (text[at] == '{') {
            scopes_.push_back({scope_, {}, {}, {}});
            scope_ = static_cast<int>(scopes_.size()) - 1;
            at++;
        } else if (text[at] == '}') {
            scope_ = scopes_[scope_].parent;
            at++;
        } else if (isspace(static_cast<unsigned char>(text[at])) || text[at] == ';') {
            line_ += text[at] == '\n';
            at++;
        } else {
            bool is_label = false;
            size_t end = end_of_statement(text, at, is_label);
            std::string statement = trimmed(text.substr(at, end - at));
            if (is_label) {
                scopes_[scope_].labels[statement] = static_cast<u32>(program_.code.size());
                last_label_ = statement;
            } else if (statement[0] == '.') {
                directive(statement);
            } else {
                instruction(statement);
            }
            for (; at <= end; at++) {
                line_ += text[at] == '\n';
            }
        }
    } while (scope_ >= 0 && at < text.size());
}

// The place of the semicolon or, behind a label, of the colon.
size_t Parser::end_of_statement(const std::string& text, size_t at, bool& is_label) const {
    bool is_name = true;
    for (size_t end = at; end < text.size(); end++) {
        char letter = text[end];
        if (letter == ';') {
            return end;
        }
        if (letter == ':' && is_name) {
            is_label = true;
            return end;
        }
        is_name = is_name && (isalnum(static_cast<unsigned char>(letter)) || letter == '_' || letter == '$');
    }
    refuse("a statement without an end");
}

void Parser::directive(const std::string& statement) {
    if (starts_with(statement, ".reg")) {
        declare_registers(statement);
    } else if (starts_with(statement, ".branchtargets")) {
        branch_tables_[last_label_] = split(statement.substr(std::string(".branchtargets").size()), ',');
    } else if (starts_with(statement, ".loc ") || starts_with(statement, ".loc\t")) {
        SourceLine place;
        if (sscanf(statement.c_str(), ".loc %d %d", &place.file, &place.line) == 2) {
            program_.locations.push_back(place);
            location_ = static_cast<int>(program_.locations.size());
        }
    } else if (!starts_with(statement, ".pragma")) {
        refuse("not emulated: " + statement);
    }
}

void Parser::declare_registers(const std::string& statement) {
    size_t type = statement.find('.', 1);
    size_t names = statement.find_first_of(" \t", type);
    for (const std::string& name : split(statement.substr(names), ',')) {
        size_t bracket = name.find('<');
        if (bracket == std::string::npos) {
            scopes_[scope_].registers[name] = new_register();
        } else {
            scopes_[scope_].families[name.substr(0, bracket)] = atoi(name.c_str() + bracket + 1);
        }
    }
}

// A register of this name, or NO_REGISTER. Inner scopes come first.
int Parser::find_register(const std::string& name) {
    static const std::map<std::string, int> special = {
        {"%tid.x", THREAD_X},       {"%tid.y", THREAD_Y},       {"%tid.z", THREAD_Z},
        {"%ntid.x", THREADS_X},     {"%ctaid.x", PROGRAM_X},    {"%ctaid.y", PROGRAM_Y},
        {"%ctaid.z", PROGRAM_Z},    {"%nctaid.x", PROGRAMS_X},  {"%nctaid.y", PROGRAMS_Y},
        {"%nctaid.z", PROGRAMS_Z},  {"%laneid", LANE},
    };
    auto found = special.find(name);
    if (found != special.end()) {
        return found->second;
    }
    size_t digits = name.find_last_not_of("0123456789") + 1;
    for (int scope = scope_; scope >= 0; scope = scopes_[scope].parent) {
        Scope& names = scopes_[scope];
        auto known = names.registers.find(name);
        if (known != names.registers.end()) {
            return known->second;
        }
        auto family = names.families.find(name.substr(0, digits));
        bool is_member = digits < name.size() && family != names.families.end();
        if (is_member && atoi(name.c_str() + digits) < family->second) {
            return names.registers[name] = new_register();
        }
    }
    return NO_REGISTER;
}

int Parser::constant(u64 value) {
    auto found = constant_registers_.find(value);
    if (found != constant_registers_.end()) {
        return found->second;
    }
    int place = new_register();
    constant_registers_[value] = place;
    program_.constants.push_back({place, value});
    return place;
}

void Parser::resolve_targets() {
    for (const OpenTarget& open : open_targets_) {
        int scope = open.scope;
        while (scope >= 0 && scopes_[scope].labels.count(open.label) == 0) {
            scope = scopes_[scope].parent;
        }
        if (scope < 0) {
            throw Fault("unknown label " + open.label);
        }
        program_.code[open.instruction].targets[open.index] = scopes_[scope].labels[open.label];
    }
}

}  // namespace ptx
