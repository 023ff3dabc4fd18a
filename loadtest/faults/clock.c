/* A wall clock that is so many seconds ahead as a file says, for the processes that load this library first.

   The monotonic clock is the system's. Waits until a moment of the wall clock end when that clock gets there; the others
   (a deadline of the monotonic clock is a small number, for machines that have been up for less than 30 years) stay. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define WALL 1000000000

static const volatile int64_t *offset;

static int64_t ahead(void) {
  static const int64_t none = 0;
  if (offset == NULL) {
    const char *name = getenv("RECALL_CLOCK_FILE");
    int file = name == NULL ? -1 : open(name, O_RDONLY | O_CLOEXEC);
    void *page = file < 0 ? MAP_FAILED : mmap(NULL, sizeof none, PROT_READ, MAP_SHARED, file, 0);
    if (file >= 0) close(file);
    offset = page == MAP_FAILED ? &none : page;
  }
  return *offset;
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int status = real(clock, now);
  if (status == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += ahead();
  return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  REAL(gettimeofday);
  int status = real(now, zone);
  if (status == 0) now->tv_sec += ahead();
  return status;
}

time_t time(time_t *into) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (into != NULL) *into = now.tv_sec;
  return now.tv_sec;
}

static struct timespec real_moment(const struct timespec *moment) {
  struct timespec found = *moment;
  if (found.tv_sec > WALL) found.tv_sec -= ahead();
  return found;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
  REAL(pthread_cond_timedwait);
  struct timespec moment = real_moment(until);
  return real(condition, mutex, &moment);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
  REAL(sem_timedwait);
  struct timespec moment = real_moment(until);
  return real(semaphore, &moment);
}
