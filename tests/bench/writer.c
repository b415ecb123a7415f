/* writer MIB RATE [shared]: hold MIB of memory, write RATE MiB of its pages a second, and check it all the time.
 *
 * Pages are written in a fixed order, so the number of writes alone tells what each word must be: a page that is lost,
 * stale or zero is a bad word, whatever else was lost with it. Lines on stdout, times in seconds of the wall clock,
 * which the hosts of a lab share:
 *
 *     ready            the memory is filled
 *     gap START LONG   the program stood still for LONG s, which is more than 20 ms
 *     bad COUNT        so many words were wrong; while it runs
 *     checked BAD      SIGUSR1 came: every word was checked, BAD words have been wrong since the start
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { WORDS = 512, STEP = 64, STRIDE = 7919, CHECKED = 16 /* pages in each turn */ };
#define GAP 0.020
#define TURN 1000000 /* ns */

static uint64_t *memory, pages, writes, inverse, bad;
static volatile sig_atomic_t asked;

static void ask(int number) { (void)number; asked = 1; }

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

/* How often a page has been written. It is the page of writes number `first`, `first` + pages, ... */
static uint64_t generation(uint64_t page) {
    uint64_t first = page * inverse % pages;
    return writes / pages + (first < writes % pages);
}

/* What a word is. One in STEP is written each time; the others keep their first value. */
static uint64_t expected(uint64_t page, int word, uint64_t generation) {
    uint64_t value = (page * WORDS + word + 1) * 0x9E3779B97F4A7C15u;
    value ^= value >> 29;
    return (value * 0xBF58476D1CE4E5B9u) ^ (word % STEP ? 0 : generation);
}

static void put(uint64_t page, int step, uint64_t generation) {
    for (int word = 0; word < WORDS; word += step)
        memory[page * WORDS + word] = expected(page, word, generation);
}

static void check(uint64_t page, int step) {
    for (int word = 0; word < WORDS; word += step)
        bad += memory[page * WORDS + word] != expected(page, word, generation(page));
}

int main(int count, char **arguments) {
    if (count != 3 && count != 4)
        return 2;
    int sharing = count == 4 ? MAP_SHARED : MAP_PRIVATE;
    double rate = atof(arguments[2]) * 256; /* pages a second */
    pages = strtoull(arguments[1], NULL, 10) * 256;
    memory = mmap(NULL, pages * WORDS * 8, PROT_READ | PROT_WRITE, sharing | MAP_ANONYMOUS, -1, 0);
    if (!pages || pages % STRIDE == 0 || memory == MAP_FAILED)
        return 3;
    while (inverse * STRIDE % pages != 1 % pages)
        inverse++;
    for (uint64_t page = 0; page < pages; page++)
        put(page, 1, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGUSR1, ask);
    printf("ready\n");

    uint64_t reading = 0, told = 0;
    double last = now(), owed = 0;
    for (;;) {
        nanosleep(&(struct timespec){.tv_nsec = TURN}, NULL);
        double time = now(), passed = time - last;
        if (passed > GAP)
            printf("gap %.6f %.6f\n", last, passed);
        last = time;
        /* What was not written in a gap is not made up for. */
        for (owed += rate * (passed > GAP ? GAP : passed); owed >= 1; owed--) {
            uint64_t page = writes % pages * STRIDE % pages;
            put(page, STEP, writes / pages + 1);
            writes++;
        }
        for (int turn = 0; turn < CHECKED; turn++, reading = (reading + 1) % pages)
            check(reading, STEP);
        if (asked) {
            asked = 0;
            for (uint64_t page = 0; page < pages; page++)
                check(page, 1);
            printf("checked %lu\n", bad);
            last = now();
        } else if (bad > told) {
            printf("bad %lu\n", told = bad);
        }
    }
}
