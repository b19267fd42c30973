/* Interrupts the calling thread with a timer, and counts how often its stack pointer was outside of its stack then. A
   signal handler without a stack of its own overwrites what lies there; this one has one, so that it can count. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

static char *lowest, *highest;
static long thread;
static volatile long interrupts, outside;

static void count(int signal, siginfo_t *info, void *context) {
    if (syscall(SYS_gettid) != thread) return;
    char *pointer = (char *)((ucontext_t *)context)->uc_mcontext.gregs[REG_RSP];
    interrupts++;
    if (pointer < lowest || pointer >= highest) outside++;
}

static void every(long microseconds) {
    struct itimerval timer = {{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &timer, NULL);
}

void probe_start(long microseconds) {
    pthread_attr_t attributes;
    void *start;
    size_t size;
    thread = syscall(SYS_gettid);
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &start, &size);
    pthread_attr_destroy(&attributes);
    lowest = start, highest = lowest + size;
    static char own_stack[1 << 16];
    stack_t own = {.ss_sp = own_stack, .ss_size = sizeof own_stack};
    sigaltstack(&own, NULL);
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = count;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigaction(SIGALRM, &action, NULL);
    interrupts = outside = 0;
    every(microseconds);
}

long probe_stop(long *all) {
    every(0);
    *all = interrupts;
    return outside;
}
