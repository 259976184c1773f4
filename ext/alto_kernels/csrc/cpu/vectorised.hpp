// One source, compiled for AVX-512, AVX2 and the baseline; the loader picks. Elsewhere the baseline alone.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define ALTO_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ALTO_VECTORISED
#endif
