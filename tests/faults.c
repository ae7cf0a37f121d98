/* Makes one call that writes fail, to be loaded with LD_PRELOAD.
 *
 * A point is a call that changes a file system, or a handle that was opened to write, below the watched folder. Points
 * are counted from 0; the one that is armed fails with the error that was asked for, and a write has stored half by then.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[4096];

/* Shared with children, so that a process which armed a point before it forked can read what became of it. */
static struct { int counted, at, lasts, with; char hit[4300]; } *shared;

void faults_watch(const char *folder) {
    snprintf(root, sizeof root, "%s", folder);
    if (!shared) shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared->at = -1;
}

/* point: -1 for none. is_lasting: whether every later call fails too. */
void faults_arm(int point, int error, int is_lasting) {
    shared->counted = 0, shared->at = point, shared->with = error, shared->lasts = is_lasting, shared->hit[0] = 0;
}

int faults_count(void) { return shared->counted; }
const char *faults_hit(void) { return shared->hit; }

static int is_within(const char *path) {
    size_t length = strlen(root);
    return length && path && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

static int path_of(int handle, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t found = readlink(link, path, size - 1);
    path[found < 0 ? 0 : found] = 0;
    return found > 0;
}

static int fails(const char *call, const char *path) {
    if (!is_within(path)) return 0;
    int number = __atomic_fetch_add(&shared->counted, 1, __ATOMIC_SEQ_CST);
    if (shared->at < 0 || number < shared->at || (number > shared->at && !shared->lasts)) return 0;
    if (number == shared->at) snprintf(shared->hit, sizeof shared->hit, "%s %s", call, path);
    errno = shared->with;
    return 1;
}

static int fails_at(const char *call, int folder, const char *path) {
    char whole[8200];
    if (path[0] == '/') return fails(call, path);
    if (folder == AT_FDCWD || !path_of(folder, whole, 4096)) return 0;
    strcat(whole, "/");
    strncat(whole, path, 4000);
    return fails(call, whole);
}

static int fails_on(const char *call, int handle) {
    char path[4096];
    int before = errno, found = path_of(handle, path, sizeof path) && fails(call, path);
    if (!found) errno = before;
    return found;
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name, folder, params, call_args)                                                                        \
    int name params {                                                                                                \
        NEXT(name);                                                                                                  \
        int mode = 0;                                                                                                \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                                         \
            va_list more;                                                                                            \
            va_start(more, flags);                                                                                   \
            mode = va_arg(more, int);                                                                                \
            va_end(more);                                                                                            \
        }                                                                                                            \
        if (WRITES(flags) && fails_at("open", folder, path)) return -1;                                              \
        return next call_args;                                                                                       \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))

ssize_t write(int handle, const void *data, size_t size) {
    NEXT(write);
    if (!fails_on("write", handle)) return next(handle, data, size);
    next(handle, data, size / 2);
    errno = shared->with;
    return -1;
}

ssize_t writev(int handle, const struct iovec *parts, int count) {
    NEXT(writev);
    return fails_on("writev", handle) ? -1 : next(handle, parts, count);
}

#define PWRITE(name, offset_t)                                                                                       \
    ssize_t name(int handle, const void *data, size_t size, offset_t offset) {                                       \
        NEXT(name);                                                                                                  \
        return fails_on("pwrite", handle) ? -1 : next(handle, data, size, offset);                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_HANDLE(name, params, call_args)                                                                           \
    int name params {                                                                                                \
        NEXT(name);                                                                                                  \
        return fails_on(#name, handle) ? -1 : next call_args;                                                        \
    }
/* What is flushed below the folder is not waited for: no machine stops here, and a disk takes most of the time. */
#define SYNC(name)                                                                                                   \
    int name(int handle) {                                                                                           \
        NEXT(name);                                                                                                  \
        char path[4096];                                                                                             \
        if (!path_of(handle, path, sizeof path) || !is_within(path)) return next(handle);                            \
        return fails(#name, path) ? -1 : 0;                                                                          \
    }
SYNC(fsync)
SYNC(fdatasync)
ON_HANDLE(ftruncate, (int handle, off_t size), (handle, size))
ON_HANDLE(ftruncate64, (int handle, off64_t size), (handle, size))

int flock(int handle, int how) {
    NEXT(flock);
    return how != LOCK_UN && fails_on("flock", handle) ? -1 : next(handle, how);
}

int close(int handle) {
    NEXT(close);
    int flags = fcntl(handle, F_GETFL);
    int failed = flags >= 0 && WRITES(flags) && fails_on("close", handle);
    int before = errno, found = next(handle);
    if (failed) errno = before;
    return failed ? -1 : found;
}

#define ON_PATH(name, params, call_args, folder, path)                                                               \
    int name params {                                                                                                \
        NEXT(name);                                                                                                  \
        return fails_at(#name, folder, path) ? -1 : next call_args;                                                  \
    }
ON_PATH(rename, (const char *old, const char *new), (old, new), AT_FDCWD, new)
ON_PATH(renameat, (int from, const char *old, int to, const char *new), (from, old, to, new), to, new)
ON_PATH(unlink, (const char *path), (path), AT_FDCWD, path)
ON_PATH(unlinkat, (int folder, const char *path, int flags), (folder, path, flags), folder, path)
ON_PATH(rmdir, (const char *path), (path), AT_FDCWD, path)
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path)
ON_PATH(mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode), folder, path)
ON_PATH(link, (const char *old, const char *new), (old, new), AT_FDCWD, new)
ON_PATH(symlink, (const char *old, const char *new), (old, new), AT_FDCWD, new)
