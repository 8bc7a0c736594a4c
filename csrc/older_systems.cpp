// Definitions that headers expect of the system, so that the library also loads where they are missing: compiled on a
// recent Linux it still works with glibc 2.28 and GCC 8's libstdc++ (manylinux_2_28). `make wheel` checks this.
#include <new>
#include <sstream>

#ifdef __GLIBC__
// Since glibc 2.32: whether a process has one thread only, for shared_ptr to count without atomics. Never true here.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif

#ifdef __GLIBCXX__
// torch's headers make error messages with these; some of their members are younger than GCC 8.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Since GCC 11: what an allocator of too many elements throws.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
#endif
