// `__shared__` variables: static ones with a tag in their symbol's name, by which they are found and spoilt.
//
// Shared memory starts undefined on a GPU; here it would start as zeros, and then as the last block left it, and hide
// a kernel that forgets to write it. A section of their own would be simpler, but GCC ignores the attribute on the
// statics of templates.

#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

#define __shared__ static __attribute__((abi_tag("amq_shared")))

namespace cuda_shim {

struct SharedVariable {
    uint16_t* address;
    size_t bytes;
};

static int this_library;  // an address in it

// From the symbol table of the file that holds this code.
inline std::vector<SharedVariable> find_shared_variables() {
    Dl_info own;
    dladdr(&this_library, &own);
    std::ifstream file(own.dli_fname, std::ios::binary | std::ios::ate);
    std::vector<char> elf(file ? static_cast<size_t>(file.tellg()) : 0);
    if (!file.seekg(0).read(elf.data(), elf.size())) {
        std::fprintf(stderr, "CUDA shim: cannot read %s, whose symbols name the shared variables\n", own.dli_fname);
        std::abort();
    }
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(elf.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(elf.data() + header->e_shoff);
    char* base = header->e_type == ET_DYN ? static_cast<char*>(own.dli_fbase) : nullptr;
    std::vector<SharedVariable> found;
    for (int s = 0; s < header->e_shnum; ++s) {
        if (sections[s].sh_type != SHT_SYMTAB) continue;
        const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(elf.data() + sections[s].sh_offset);
        const char* names = elf.data() + sections[sections[s].sh_link].sh_offset;
        for (size_t i = 0; i < sections[s].sh_size / sizeof(*symbols); ++i)
            if (std::strstr(names + symbols[i].st_name, "B10amq_shared") && symbols[i].st_shndx != SHN_UNDEF)
                found.push_back({reinterpret_cast<uint16_t*>(base + symbols[i].st_value), symbols[i].st_size});
    }
    return found;
}

// 0x7fff is not a number in fp16 and bf16, and so is 0x7fff7fff in fp32; as int32 it is large enough to be noticed.
// Red zones are written too, hence no checks; two bytes at a time, which no compiler makes a checked memset of.
__attribute__((no_sanitize("address", "undefined"))) inline void spoil_shared_memory() {
    static const std::vector<SharedVariable> variables = find_shared_variables();
    for (const SharedVariable& variable : variables)
        for (size_t i = 0; i < variable.bytes / 2; ++i) variable.address[i] = 0x7fff;
}

}  // namespace cuda_shim
