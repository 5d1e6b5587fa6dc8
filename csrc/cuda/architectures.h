// Which GPUs a build has code for.
#pragma once

#include <algorithm>
#include <charconv>
#include <string_view>

namespace sepconv::cuda {

// `archs`: what the build was made for, as in "8.0+PTX 9.0a". Machine code runs on GPUs of the same major version from
// its minor version on, that of "a" on its own version only; PTX on everything newer.
inline bool has_code_for(std::string_view archs, int compute_capability) {
  while (!archs.empty()) {
    const std::string_view arch = archs.substr(0, archs.find(' '));
    archs.remove_prefix(std::min(arch.size() + 1, archs.size()));
    int major = 0, minor = 0;
    const char* const end = arch.data() + arch.size();
    const auto point = std::from_chars(arch.data(), end, major);
    if (point.ec != std::errc() || point.ptr == end || *point.ptr != '.') continue;
    const auto rest = std::from_chars(point.ptr + 1, end, minor);
    if (rest.ec != std::errc()) continue;
    const std::string_view suffix(rest.ptr, static_cast<size_t>(end - rest.ptr));
    const int version = 10 * major + minor;
    if (compute_capability == version) return true;
    if (compute_capability < version) continue;
    if (suffix.ends_with("+PTX") || (suffix.empty() && compute_capability / 10 == major)) return true;
    if (suffix.starts_with("f") && compute_capability / 10 == major) return true;
  }
  return false;
}

}  // namespace sepconv::cuda
