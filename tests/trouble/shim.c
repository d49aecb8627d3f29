/* Stands between a program and the C library, for the files below $NERVE_SHIM_DIRECTORY: LD_PRELOAD=shim.so.
 *
 * $NERVE_SHIM_RECORD=FILE  writes down everything that changes them or makes them durable, with all the bytes.
 * $NERVE_SHIM_FAIL="K N ERRNO"  the K-th of such calls, and N in all from there on (0: all), fails with ERRNO and changes
 *     nothing; with ERRNO 0 a write is cut short in the middle and then fails with ENOSPC.
 * $NERVE_SHIM_COUNT=FILE  says there, at each call, how many there were.
 * What is written to a file called "acknowledged" never fails and is no change: it is what somebody was told.
 *
 * A record is: kind, length of the path, offset, length of the file before, length of the data, path, data; numbers are of
 * 8 bytes, as the machine has them. Kinds: w write, t truncate (offset: to what length), s sync, d sync of a directory,
 * c create, m make a directory, u unlink, r rename (data: the new path), a acknowledgement.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static const char *directory;
static int record = -1, counter = -1;
static char *paths[FILES];
static uint64_t calls, fail_at, fail_times;
static int fail_with;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("NERVE_SHIM_RECORD"), *fail = getenv("NERVE_SHIM_FAIL"), *count = getenv("NERVE_SHIM_COUNT");
    if (file) record = NEXT(open)(file, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (count) counter = NEXT(open)(count, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fail) sscanf(fail, "%lu %lu %d", &fail_at, &fail_times, &fail_with);
    directory = getenv("NERVE_SHIM_DIRECTORY");
}

static int is_ours(const char *path) {
    size_t length = directory ? strlen(directory) : 0;
    return length && !strncmp(path, directory, length) && (path[length] == '/' || !path[length]);
}

static int is_told(const char *path) {
    const char *name = strrchr(path, '/');
    return name && !strcmp(name, "/acknowledged");
}

static const char *path_of(int fd) { return fd >= 0 && fd < FILES ? paths[fd] : NULL; }

/* Whether this call fails; 2: in the middle. */
static int fails(void) {
    calls++;
    if (counter >= 0) {
        char text[24];
        int length = snprintf(text, sizeof text, "%lu\n", calls);
        NEXT(pwrite)(counter, text, length, 0);
    }
    if (!fail_at || calls < fail_at || (fail_times && calls >= fail_at + fail_times)) return 0;
    errno = fail_with ? fail_with : ENOSPC;
    return fail_with ? 1 : 2;
}

static void note(uint64_t kind, const char *path, uint64_t offset, uint64_t before, const void *data, uint64_t length) {
    if (record < 0) return;
    uint64_t head[5] = {kind, strlen(path), offset, before, length};
    struct iovec parts[3] = {{head, sizeof head}, {(void *)path, strlen(path)}, {(void *)data, length}};
    if (NEXT(writev)(record, parts, 3) != (ssize_t)(sizeof head + strlen(path) + length)) abort();
}

static uint64_t length_of(int fd) {
    struct stat found;
    return fstat(fd, &found) ? 0 : (uint64_t)found.st_size;
}

static void opened(int fd, const char *path, int is_new) {
    if (fd < 0 || fd >= FILES) return;
    pthread_mutex_lock(&lock);
    free(paths[fd]);
    paths[fd] = is_ours(path) ? strdup(path) : NULL;
    if (paths[fd] && is_new) note('c', path, 0, 0, "", 0);
    pthread_mutex_unlock(&lock);
}

static int do_open(int at, const char *path, int flags, mode_t mode) {
    int is_new = (flags & O_CREAT) && is_ours(path) && !is_told(path) && access(path, F_OK);
    if (is_ours(path) && !is_told(path) && (is_new || (flags & O_TRUNC))) {
        pthread_mutex_lock(&lock);
        int bad = fails();
        pthread_mutex_unlock(&lock);
        if (bad) return -1;
    }
    uint64_t before = 0;
    struct stat found;
    if (is_ours(path) && !stat(path, &found)) before = found.st_size;
    int fd = NEXT(openat)(at, path, flags, mode);
    opened(fd, path, is_new);
    if (fd >= 0 && path_of(fd) && !is_told(path) && !is_new && (flags & O_TRUNC)) {
        pthread_mutex_lock(&lock);
        note('t', path, 0, before, "", 0);
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
int open(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return do_open(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags) return do_open(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags) return do_open(at, path, flags, mode); }

int close(int fd) {
    if (fd >= 0 && fd < FILES) {
        pthread_mutex_lock(&lock);
        free(paths[fd]);
        paths[fd] = NULL;
        pthread_mutex_unlock(&lock);
    }
    return NEXT(close)(fd);
}

static ssize_t do_write(int fd, const void *data, size_t length, off64_t offset, int is_at) {
    const char *path = path_of(fd);
    if (!path) return is_at ? NEXT(pwrite64)(fd, data, length, offset) : NEXT(write)(fd, data, length);
    pthread_mutex_lock(&lock);
    if (is_told(path)) {
        note('a', path, 0, 0, data, length);
        ssize_t done = NEXT(write)(fd, data, length);
        pthread_mutex_unlock(&lock);
        return done;
    }
    int bad = fails();
    ssize_t done = -1;
    if (bad == 2 && length > 1) {
        length /= 2;
        fail_at = calls + 1;
        fail_with = ENOSPC;
        bad = 0;
    }
    if (!bad) {
        uint64_t before = length_of(fd);
        if (!is_at) offset = lseek64(fd, 0, SEEK_CUR);
        done = is_at ? NEXT(pwrite64)(fd, data, length, offset) : NEXT(write)(fd, data, length);
        if (done > 0) note('w', path, offset, before, data, done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}
ssize_t write(int fd, const void *data, size_t length) { return do_write(fd, data, length, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return do_write(fd, data, length, at, 1); }
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t at) { return do_write(fd, data, length, at, 1); }

static int do_truncate(int fd, off64_t length) {
    const char *path = path_of(fd);
    if (!path) return NEXT(ftruncate64)(fd, length);
    pthread_mutex_lock(&lock);
    uint64_t before = length_of(fd);
    int done = fails() ? -1 : NEXT(ftruncate64)(fd, length);
    if (!done) note('t', path, length, before, "", 0);
    pthread_mutex_unlock(&lock);
    return done;
}
int ftruncate(int fd, off_t length) { return do_truncate(fd, length); }
int ftruncate64(int fd, off64_t length) { return do_truncate(fd, length); }

static int do_sync(int fd, int is_data) {
    const char *path = path_of(fd);
    struct stat found;
    if (!path) return is_data ? NEXT(fdatasync)(fd) : NEXT(fsync)(fd);
    pthread_mutex_lock(&lock);
    uint64_t before = length_of(fd);
    int done = fails() ? -1 : 0;
    /* Nothing is lost in this machine: whether it is called makes no difference but time. */
    if (!done) note(!fstat(fd, &found) && S_ISDIR(found.st_mode) ? 'd' : 's', path, 0, before, "", 0);
    pthread_mutex_unlock(&lock);
    return done;
}
int fsync(int fd) { return do_sync(fd, 0); }
int fdatasync(int fd) { return do_sync(fd, 1); }

#define ENTRY(path, call, kind, data, length) \
    if (!is_ours(path)) return call; \
    pthread_mutex_lock(&lock); \
    int done = fails() ? -1 : call; \
    if (!done) note(kind, path, 0, 0, data, length); \
    pthread_mutex_unlock(&lock); \
    return done;
int unlink(const char *path) { ENTRY(path, NEXT(unlink)(path), 'u', "", 0) }
int mkdir(const char *path, mode_t mode) { ENTRY(path, NEXT(mkdir)(path, mode), 'm', "", 0) }
int rename(const char *from, const char *to) { ENTRY(from, NEXT(rename)(from, to), 'r', to, strlen(to)) }
