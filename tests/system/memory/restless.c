/* A program that checks its own memory while it changes its address space: restless FILE SEED MIB THREADS

Each thread owns regions. Each page of a region has a generation; generation 0 is a page of zeros, and otherwise each
word of the page is a function of its region's name, its page and its generation. The threads write, move, grow, shrink,
unmap, map, empty and protect their regions; the first thread forks children, which check what they have inherited, and
change it. A wrong word counts as bad. FILE gets a line now and then: steps, bad words, children, the last bad word.
SIGUSR1: check everything, and add a line that begins with "swept". */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, REGIONS = 24, MOST = 2048, CHILDREN = 6 };

struct region {
    uint64_t name, *memory;
    size_t pages;
    int is_one; /* mapping: mremap takes no more */
    uint32_t generation[MOST];
};
struct thread {
    uint64_t random;
    int number;
    struct region regions[REGIONS];
};

static int out, threads;
static size_t region_pages;
static struct thread *all;
static volatile sig_atomic_t sweep_asked;
static long steps, bad, children, swept;
static uint64_t names = 1;
static char last[160] = "-";

static uint64_t pick(struct thread *thread, uint64_t below) {
    thread->random ^= thread->random << 13, thread->random ^= thread->random >> 7, thread->random ^= thread->random << 17;
    return thread->random % below;
}

static uint64_t word(struct region *region, size_t page, size_t at) {
    uint32_t generation = region->generation[page];
    if (!generation)
        return 0;
    return (region->name * 0x9E3779B97F4A7C15ull) ^ ((uint64_t)page << 40) ^ ((uint64_t)generation << 12) ^ at;
}

static void write_page(struct region *region, size_t page) {
    region->generation[page]++;
    for (size_t at = 0; at < WORDS; at++)
        region->memory[page * WORDS + at] = word(region, page, at);
}

static long check_page(struct region *region, size_t page, const char *who) {
    long wrong = 0;
    for (size_t at = 0; at < WORDS; at += 37) {
        uint64_t is = region->memory[page * WORDS + at];
        if (is != word(region, page, at)) {
            if (!wrong++)
                snprintf(last, sizeof last, "%s:%p=%llx-generation-%u", who, (void *)&region->memory[page * WORDS],
                         (unsigned long long)is, region->generation[page]);
        }
    }
    if (wrong)
        __atomic_add_fetch(&bad, wrong, __ATOMIC_RELAXED);
    return wrong;
}

static void *fail(const char *what) {
    dprintf(out, "failed %s %s\n", what, strerror(errno));
    _exit(3);
}

static void *map(size_t pages) {
    void *found = mmap(0, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return found == MAP_FAILED ? fail("mmap") : found;
}

static void renew(struct region *region, size_t pages) {
    region->name = __atomic_fetch_add(&names, 1, __ATOMIC_RELAXED);
    region->pages = pages;
    region->is_one = 1;
    memset(region->generation, 0, sizeof region->generation);
    region->memory = map(pages);
}

static long child_of(struct thread *thread) {
    long wrong = 0;
    for (int number = 0; number < threads; number++)
        if (number == thread->number)
            for (int at = 0; at < REGIONS; at++) {
                struct region *region = &all[number].regions[at];
                size_t step = 1 + pick(thread, 16);
                for (size_t page = pick(thread, step); page < region->pages; page += step)
                    wrong += check_page(region, page, "child");
                if (region->pages > 8 && pick(thread, 2)) {
                    madvise(region->memory, 4 * PAGE, MADV_DONTNEED);
                    memset(region->generation, 0, 4 * sizeof *region->generation);
                    for (size_t page = 0; page < 6; page++)
                        wrong += check_page(region, page, "child after madvise");
                }
            }
    return wrong;
}

static void fork_one(struct thread *thread) {
    static int running;
    int status;
    pid_t pid;
    while (running && (pid = waitpid(-1, &status, running >= CHILDREN ? 0 : WNOHANG)) > 0) {
        running--;
        children++;
        if (status) {
            __atomic_add_fetch(&bad, 1, __ATOMIC_RELAXED);
            snprintf(last, sizeof last, "child-status-%x", status);
        }
    }
    pid = fork();
    if (pid < 0)
        fail("fork");
    if (pid) {
        running++;
        return;
    }
    long before = bad;
    if (!pick(thread, 4)) {
        pid_t grandchild = fork();
        if (!grandchild)
            _exit(child_of(thread) != 0);
        child_of(thread);
        if (waitpid(grandchild, &status, 0) != grandchild || status)
            bad++;
    } else
        child_of(thread);
    if (bad != before)
        dprintf(out, "child %s\n", last);
    _exit(bad != before);
}

static void move(struct thread *thread, struct region *region) {
    size_t pages = region->pages;
    int how = pick(thread, 4);
    if (how == 0) { /* to a place where something else is */
        void *there = map(pages);
        if (mremap(region->memory, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, there) != there)
            fail("mremap to a place");
        region->memory = there;
        return;
    }
    if (how == 1 && pages < MOST / 2)
        pages += 1 + pick(thread, 64);
    else if (how == 2 && pages > 16)
        pages -= 1 + pick(thread, pages / 2);
    void *there = mremap(region->memory, region->pages * PAGE, pages * PAGE, MREMAP_MAYMOVE);
    if (there == MAP_FAILED)
        fail("mremap");
    if (pages < region->pages)
        memset(region->generation + pages, 0, (region->pages - pages) * sizeof *region->generation);
    region->memory = there;
    region->pages = pages;
}

static void step(struct thread *thread) {
    struct region *region = &thread->regions[pick(thread, REGIONS)];
    size_t page = pick(thread, region->pages), count = 1 + pick(thread, 32);
    if (page + count > region->pages)
        count = region->pages - page;
    char *start = (char *)region->memory + page * PAGE;
    int what = pick(thread, 100);
    if (what < 60) {
        for (size_t at = page; at < page + count; at++) {
            check_page(region, at, "read");
            if (!pick(thread, 3))
                write_page(region, at);
        }
    } else if (what < 70) {
        if (madvise(start, count * PAGE, MADV_DONTNEED))
            fail("madvise");
        memset(region->generation + page, 0, count * sizeof *region->generation);
        check_page(region, page, "emptied");
    } else if (what < 80) {
        if (region->is_one)
            move(thread, region);
        check_page(region, pick(thread, region->pages), "moved");
    } else if (what < 84) {
        munmap(region->memory, region->pages * PAGE);
        renew(region, region_pages / 2 + pick(thread, region_pages));
    } else if (what < 92) {
        if (mprotect(start, count * PAGE, PROT_NONE) || mprotect(start, count * PAGE, PROT_READ | PROT_WRITE))
            fail("mprotect");
        check_page(region, page, "protected");
    } else if (what < 96) { /* a hole, and a new mapping in it */
        region->is_one = 0;
        munmap(start, count * PAGE);
        if (mmap(start, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == (void *)start)
            memset(region->generation + page, 0, count * sizeof *region->generation);
        else { /* another thread was faster: the region ends here */
            if (page + count < region->pages)
                munmap(start + count * PAGE, (region->pages - page - count) * PAGE);
            memset(region->generation + page, 0, (region->pages - page) * sizeof *region->generation);
            region->pages = page;
            if (!page)
                renew(region, region_pages);
        }
    } else if (thread->number == 0 && what < 98)
        fork_one(thread);
    __atomic_add_fetch(&steps, 1, __ATOMIC_RELAXED);
}

static void *run(void *argument) {
    struct thread *thread = argument;
    long done = 0;
    for (unsigned long turn = 1;; turn++) {
        step(thread);
        if (turn % 8 == 0)
            usleep(200);
        if (sweep_asked != done) {
            done = sweep_asked;
            for (int at = 0; at < REGIONS; at++)
                for (size_t page = 0; page < thread->regions[at].pages; page++)
                    check_page(&thread->regions[at], page, "swept");
            if (__atomic_add_fetch(&swept, 1, __ATOMIC_RELAXED) == threads) {
                swept = 0;
                dprintf(out, "swept %ld %ld %ld %s\n", steps, bad, children, last);
            }
        }
        if (thread->number == 0 && turn % 64 == 0)
            dprintf(out, "steps %ld %ld %ld %s\n", steps, bad, children, last);
    }
    return 0;
}

static void ask(int signal) {
    (void)signal;
    sweep_asked++;
}

int main(int count, char **values) {
    if (count != 5)
        return 2;
    out = open(values[1], O_WRONLY | O_CREAT | O_APPEND, 0600);
    threads = atoi(values[4]);
    region_pages = ((size_t)atol(values[3]) << 20) / PAGE / REGIONS / threads;
    if (region_pages > MOST / 3)
        return 2;
    all = calloc(threads, sizeof *all);
    signal(SIGUSR1, ask);
    for (int number = 0; number < threads; number++) {
        all[number].number = number;
        all[number].random = (strtoull(values[2], 0, 10) * 1000003 + number) * 0x9E3779B97F4A7C15ull | 1;
        for (int at = 0; at < REGIONS; at++) {
            struct region *region = &all[number].regions[at];
            renew(region, region_pages / 2 + pick(&all[number], region_pages));
            for (size_t page = 0; page < region->pages; page++)
                if (pick(&all[number], 8))
                    write_page(region, page);
        }
    }
    dprintf(out, "ready 0 0 0 -\n");
    for (int number = 1; number < threads; number++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, run, &all[number]))
            return 4;
    }
    run(&all[0]);
}
