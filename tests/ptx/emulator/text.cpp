// Cutting text into parts, and making text of values.
#include "text.h"

#include <cctype>
#include <cstdarg>
#include <cstdio>

#include "program.h"

namespace ptx {

std::string format(const char* pattern, ...) {
    char text[4096];
    va_list values;
    va_start(values, pattern);
    vsnprintf(text, sizeof text, pattern, values);
    va_end(values);
    return text;
}

std::string trimmed(const std::string& text) {
    const char* white = " \t\r\n";
    size_t first = text.find_first_not_of(white);
    if (first == std::string::npos) {
        return "";
    }
    return text.substr(first, text.find_last_not_of(white) - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    if (trimmed(text).empty()) {
        return parts;
    }
    int depth = 0;
    std::string part;
    for (char letter : text) {
        if (letter == '[' || letter == '{' || letter == '(') {
            depth++;
        }
        if (letter == ']' || letter == '}' || letter == ')') {
            depth--;
        }
        if (letter == separator && depth == 0) {
            parts.push_back(trimmed(part));
            part.clear();
        } else {
            part += letter;
        }
    }
    parts.push_back(trimmed(part));
    return parts;
}

bool starts_with(const std::string& text, const std::string& beginning) {
    return text.compare(0, beginning.size(), beginning) == 0;
}

std::string on_one_line(const std::string& text) {
    std::string line;
    for (char letter : text) {
        if (!isspace(static_cast<unsigned char>(letter))) {
            line += letter;
        } else if (!line.empty() && line.back() != ' ') {
            line += ' ';
        }
    }
    return line;
}

}  // namespace ptx
