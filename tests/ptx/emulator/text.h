// Cutting text into parts, for the parser.
#pragma once

#include <string>
#include <vector>

namespace ptx {

// Without white space at both ends.
std::string trimmed(const std::string& text);

// The parts between separators. Separators within brackets do not count. Parts are trimmed; empty text has none.
std::vector<std::string> split(const std::string& text, char separator);

bool starts_with(const std::string& text, const std::string& beginning);

// With each run of white space as one space.
std::string on_one_line(const std::string& text);

}  // namespace ptx
