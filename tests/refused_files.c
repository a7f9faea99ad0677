// Preloaded into a run by tests/refused_files.py: opening the files that a pattern names fails.
//
// OPENED names a file to which every opened path is added, with "r" or "w" before it.
// REFUSED is "r PATTERN NUMBER" or "w PATTERN NUMBER": opening a path that matches the pattern (fnmatch), to read or to
// write it, fails with the error of this number. For ENOSPC the file can be opened, and is full.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int raw_open(const char *path, int flags) { return syscall(SYS_openat, AT_FDCWD, path, flags, 0666); }

// Return the number of the error with which opening `path` fails, or 0.
static int refused(const char *path, char mode) {
    char whole[PATH_MAX], pattern[PATH_MAX], wanted;
    int number;
    if (path == NULL) return 0;
    if (path[0] == '/') snprintf(whole, sizeof whole, "%s", path);
    else if (getcwd(whole, sizeof whole) != NULL) snprintf(whole + strlen(whole), sizeof whole - strlen(whole), "/%s", path);
    const char *log = getenv("OPENED"), *rule = getenv("REFUSED");
    if (log != NULL) {
        char line[PATH_MAX + 4];
        int length = snprintf(line, sizeof line, "%c %s\n", mode, whole), file = raw_open(log, O_WRONLY | O_CREAT | O_APPEND);
        if (write(file, line, length) < 0) abort();
        close(file);
    }
    if (rule == NULL || sscanf(rule, "%c %s %d", &wanted, pattern, &number) != 3) return 0;
    return wanted == mode && fnmatch(pattern, whole, 0) == 0 ? number : 0;
}

static char mode_of(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? 'r' : 'w'; }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define PERMISSIONS(flags)                                  \
    mode_t permissions = 0;                                 \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                  \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        permissions = va_arg(rest, mode_t);                 \
        va_end(rest);                                       \
    }
#define REFUSE(path, mode, full, fail)                      \
    int number = refused(path, mode);                       \
    if (number == ENOSPC) return full;                      \
    if (number) {                                           \
        errno = number;                                     \
        return fail;                                        \
    }

int open(const char *path, int flags, ...) {
    PERMISSIONS(flags) REFUSE(path, mode_of(flags), raw_open("/dev/full", O_RDWR | (flags & O_CLOEXEC)), -1) REAL(open);
    return real(path, flags, permissions);
}

int open64(const char *path, int flags, ...) {
    PERMISSIONS(flags) REFUSE(path, mode_of(flags), raw_open("/dev/full", O_RDWR | (flags & O_CLOEXEC)), -1) REAL(open64);
    return real(path, flags, permissions);
}

FILE *fopen(const char *path, const char *mode) {
    REAL(fopen);
    REFUSE(path, strpbrk(mode, "wa+") ? 'w' : 'r', real("/dev/full", mode), NULL)
    return real(path, mode);
}

FILE *fopen64(const char *path, const char *mode) {
    REAL(fopen64);
    REFUSE(path, strpbrk(mode, "wa+") ? 'w' : 'r', real("/dev/full", mode), NULL)
    return real(path, mode);
}

DIR *opendir(const char *path) {
    REFUSE(path, 'd', NULL, NULL) REAL(opendir);
    return real(path);
}
