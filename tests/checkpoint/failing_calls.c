/* A library for LD_PRELOAD that makes file operations under one folder fail.

   FAILING_FOLDER: calls that name a path under it, or a descriptor of such a file, are counted.
   FAILING_STATE: a file of five 64-bit numbers that all processes of a run share and the test writes:
     count   calls so far
     first   number of the call that fails; 0: none does
     last    number of the last call that fails
     error   the errno they fail with
     failed  calls that failed */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct state { int64_t count, first, last, error, failed; };
static struct state *shared;
static const char *folder;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAILING_STATE");
    folder = getenv("FAILING_FOLDER");
    if (!name || !folder) return;
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int handle = real(name, O_RDWR);
    if (handle < 0) return;
    void *found = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    if (found != MAP_FAILED) shared = found;
    int (*shut)(int) = dlsym(RTLD_NEXT, "close");
    shut(handle);
}

static int counted(void) {
    int64_t now = __atomic_add_fetch(&shared->count, 1, __ATOMIC_SEQ_CST);
    if (!shared->first || now < shared->first || now > shared->last) return 0;
    __atomic_add_fetch(&shared->failed, 1, __ATOMIC_SEQ_CST);
    return (int)shared->error;
}

/* The errno that a call fails with, 0 if it does not. */
static int path_fails(const char *path) {
    if (!shared || !path || strncmp(path, folder, strlen(folder))) return 0;
    return counted();
}

static int handle_fails(int handle) {
    char link[64], path[4096];
    if (!shared || handle < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return path_fails(path);
}

/* rmtree names files relative to their folder's descriptor. */
static int at_fails(int handle, const char *path) {
    return path && path[0] != '/' && handle != AT_FDCWD ? handle_fails(handle) : path_fails(path);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FAIL(error, value) do { int e_ = (error); if (e_) { errno = e_; return value; } } while (0)

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list more; va_start(more, flags);                            \
        mode_t mode = va_arg(more, mode_t); va_end(more);               \
        FAIL(path_fails(path), -1);                                     \
        REAL(name); return real(path, flags, mode);                     \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name)                                                    \
    int name(int at, const char *path, int flags, ...) {                \
        va_list more; va_start(more, flags);                            \
        mode_t mode = va_arg(more, mode_t); va_end(more);               \
        FAIL(at_fails(at, path), -1);                                   \
        REAL(name); return real(at, path, flags, mode);                 \
    }
OPENAT(openat)
OPENAT(openat64)
FILE *fopen(const char *path, const char *mode) { FAIL(path_fails(path), NULL); REAL(fopen); return real(path, mode); }
FILE *fopen64(const char *path, const char *mode) { FAIL(path_fails(path), NULL); REAL(fopen64); return real(path, mode); }
ssize_t write(int h, const void *b, size_t n) { FAIL(handle_fails(h), -1); REAL(write); return real(h, b, n); }
ssize_t read(int h, void *b, size_t n) { FAIL(handle_fails(h), -1); REAL(read); return real(h, b, n); }
ssize_t pwrite(int h, const void *b, size_t n, off_t o) { FAIL(handle_fails(h), -1); REAL(pwrite); return real(h, b, n, o); }
ssize_t pwrite64(int h, const void *b, size_t n, off64_t o) { FAIL(handle_fails(h), -1); REAL(pwrite64); return real(h, b, n, o); }
ssize_t writev(int h, const struct iovec *v, int n) { FAIL(handle_fails(h), -1); REAL(writev); return real(h, v, n); }
int fsync(int h) { FAIL(handle_fails(h), -1); REAL(fsync); return real(h); }
int fdatasync(int h) { FAIL(handle_fails(h), -1); REAL(fdatasync); return real(h); }
int posix_fallocate(int h, off_t o, off_t n) { int e = handle_fails(h); if (e) return e; REAL(posix_fallocate); return real(h, o, n); }
int posix_fallocate64(int h, off64_t o, off64_t n) { int e = handle_fails(h); if (e) return e; REAL(posix_fallocate64); return real(h, o, n); }
int mkdir(const char *path, mode_t mode) { FAIL(path_fails(path), -1); REAL(mkdir); return real(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) { FAIL(at_fails(at, path), -1); REAL(mkdirat); return real(at, path, mode); }
int rmdir(const char *path) { FAIL(path_fails(path), -1); REAL(rmdir); return real(path); }
int unlink(const char *path) { FAIL(path_fails(path), -1); REAL(unlink); return real(path); }
int unlinkat(int at, const char *path, int flags) { FAIL(at_fails(at, path), -1); REAL(unlinkat); return real(at, path, flags); }
int rename(const char *from, const char *to) { FAIL(path_fails(from), -1); REAL(rename); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) { FAIL(at_fails(a, from), -1); REAL(renameat); return real(a, from, b, to); }
int chmod(const char *path, mode_t mode) { FAIL(path_fails(path), -1); REAL(chmod); return real(path, mode); }
/* A close that fails has closed all the same. */
int close(int h) { int e = handle_fails(h); REAL(close); int r = real(h); if (e) { errno = e; return -1; } return r; }
