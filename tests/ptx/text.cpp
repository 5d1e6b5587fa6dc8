// Runs one entry of a PTX file on plain buffers, or parses all entries of files: for tests of the machine itself.
//
//   text parse FILE...
//   text run FILE ENTRY grid=X,Y,Z block=X,Y,Z shared=BYTES seed=N PARAMETER...
//
// A parameter is in:PATH (a buffer that holds the file), out:BYTES:PATH (one that is written, and saved), work:BYTES,
// or u32:NUMBER, in the order of the entry's own.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>

#include "machine.h"

namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw ptx::Fault("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

int parse_all(int count, char** paths) {
  int entries = 0;
  for (int i = 0; i < count; ++i) {
    const std::string text = read_file(paths[i]);
    for (size_t at = text.find(".entry "); at != std::string::npos; at = text.find(".entry ", at + 1), ++entries) {
      const std::string name = text.substr(at + 7, text.find_first_of("( \n", at + 7) - at - 7);
      try {
        ptx::parse(text, name);
      } catch (const ptx::Fault& fault) {
        printf("FAULT %s: %s: %s\n", paths[i], name.c_str(), fault.what());
        return 1;
      }
    }
  }
  printf("right: %d entries\n", entries);
  return 0;
}

struct Buffer {
  unsigned char* data = nullptr;
  size_t bytes = 0;
  std::string saved_to;
};

int run(int count, char** words) {
  const std::string text = read_file(words[0]);
  ptx::GlobalMemory memory;
  ptx::Launch launch;
  uint64_t seed = 0;
  std::vector<uint64_t> values;
  std::vector<Buffer> buffers;
  const auto make = [&](size_t bytes) {
    Buffer b;
    b.data = static_cast<unsigned char*>(aligned_alloc(256, (bytes + 256) / 256 * 256));
    b.bytes = bytes;
    memset(b.data, 0xFF, bytes);
    values.push_back(reinterpret_cast<uint64_t>(b.data));
    return b;
  };
  for (int i = 2; i < count; ++i) {
    const std::string word = words[i];
    const size_t split = word.find_first_of("=:");
    const std::string key = word.substr(0, split), value = word.substr(split + 1);
    if (key == "grid" || key == "block") {
      auto& size = key == "grid" ? launch.grid : launch.block;
      sscanf(value.c_str(), "%u,%u,%u", &size[0], &size[1], &size[2]);
    } else if (key == "shared") {
      launch.dynamic_shared = static_cast<uint32_t>(std::stoul(value));
    } else if (key == "early") {
      launch.early = true;
    } else if (key == "seed") {
      seed = std::stoull(value);
    } else if (key == "in") {
      const std::string content = read_file(value);
      const Buffer b = make(content.size());
      memcpy(b.data, content.data(), content.size());
      memory.add(b.data, b.bytes);
      buffers.push_back(b);
    } else if (key == "out" || key == "work") {
      Buffer b = make(std::stoull(value));
      if (key == "out") b.saved_to = value.substr(value.find(':') + 1);
      memory.watch(b.data, b.bytes);
      buffers.push_back(b);
    } else if (key == "u32") {
      values.push_back(std::stoull(value, nullptr, 0));
    } else {
      throw ptx::Fault("unknown word " + word);
    }
  }
  const ptx::Program program = ptx::parse(text, words[1]);
  if (values.size() != program.parameters.size()) throw ptx::Fault("the entry has another number of parameters");
  launch.parameters.assign(program.parameter_bytes, 0xFF);
  for (size_t i = 0; i < values.size(); ++i) {
    memcpy(&launch.parameters[program.parameters[i].offset], &values[i], program.parameters[i].bytes);
  }
  ptx::Machine machine(program, launch, memory, seed);
  machine.run();
  for (const Buffer& b : buffers) {
    if (b.saved_to.empty()) continue;
    std::ofstream(b.saved_to, std::ios::binary)
        .write(reinterpret_cast<const char*>(b.data), static_cast<std::streamsize>(b.bytes));
  }
  for (const auto& [what, c] : machine.counts.memory) {
    printf("memory: requests=%llu wavefronts=%llu ideal=%llu sectors=%llu bytes=%llu %s\n",
           (unsigned long long)c.requests, (unsigned long long)c.wavefronts, (unsigned long long)c.ideal,
           (unsigned long long)c.sectors, (unsigned long long)c.bytes, what.c_str());
  }
  printf("right\n");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  try {
    const std::string what = count > 1 ? words[1] : "";
    if (what == "parse") return parse_all(count - 2, words + 2);
    if (what == "run" && count > 3) return run(count - 2, words + 2);
    printf("ERROR text parse FILE... | text run FILE ENTRY ...\n");
    return 2;
  } catch (const ptx::Fault& fault) {
    printf("FAULT %s\n", fault.what());
    return 1;
  } catch (const std::exception& e) {
    printf("ERROR %s\n", e.what());
    return 2;
  }
}
