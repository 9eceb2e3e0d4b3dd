/* Teams of threads for ThreadSanitizer, which cannot see how GNU OpenMP's wait for one another: started and joined by
 * pthread functions, for each piece of work. `ThreadSanitizer` of tests/layers/test_native_sanitizers.py links this. */

#include <pthread.h>
#include <stdlib.h>

typedef struct {
    void (*work)(void *);
    void *job;
    int number, threads;
} Member;

static __thread Member *self;

static void *run(void *member) {
    self = member;
    self->work(self->job);
    self = NULL;
    return NULL;
}

void watched_parallel(void (*work)(void *), void *job, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t *started = malloc(threads * sizeof *started);
    Member *members = malloc(threads * sizeof *members);
    for (unsigned i = 0; i < threads; i++) {
        members[i] = (Member){work, job, i, threads};
        if (pthread_create(&started[i], NULL, run, &members[i])) abort();
    }
    for (unsigned i = 0; i < threads; i++) pthread_join(started[i], NULL);
    free(started), free(members);
}

/* with RACE in the environment every thread takes itself for the first: they write the same sums */
int watched_number(void) { return getenv("RACE") ? 0 : self->number; }
int watched_threads(void) { return self->threads; }
