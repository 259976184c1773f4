// Fields of a Python row, and the refusal of what they must not be.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "reader.hpp"

namespace alto {

inline std::string text(pybind11::handle row, const char* name) { return pybind11::cast<std::string>(row.attr(name)); }
inline double number(pybind11::handle row, const char* name) { return pybind11::cast<double>(row.attr(name)); }
inline long long whole(pybind11::handle row, const char* name) { return pybind11::cast<long long>(row.attr(name)); }

inline void require(bool holds, const std::string& subject, const char* message) {
    if (!holds) throw ReadError("invalid", subject, message);
}

}  // namespace alto
