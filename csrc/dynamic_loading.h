// dlopen and dlsym, of the versions that manylinux_2_28 has: from glibc 2.34 on there are younger ones, and a library
// linked against those loads nowhere else (older_systems.cpp).
#pragma once

#include <dlfcn.h>

#if defined(__GLIBC__) && defined(__x86_64__) && __GLIBC_PREREQ(2, 34)
__asm__(".symver dlopen,dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym,dlsym@GLIBC_2.2.5");
#endif
