/* A program that reads a file with O_DIRECT all the time: direct LOG FILE

Three threads read pieces of FILE, which it makes, into places of their memory. LOG gets a line when that has begun. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PIECE = 1 << 20, PIECES = 64, THREADS = 3 };

static int file, log_file;

static void *work(void *number) {
    unsigned seed = (uintptr_t)number;
    char *memory = mmap(NULL, (size_t)PIECE * PIECES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 1, (size_t)PIECE * PIECES);
    for (;;) {
        char *place = memory + (size_t)(rand_r(&seed) % PIECES) * PIECE;
        if (pread(file, place, PIECE, (off_t)(rand_r(&seed) % PIECES) * PIECE) != PIECE)
            exit(3);
    }
}

int main(int count, char **values) {
    if (count != 3)
        return 2;
    log_file = open(values[1], O_CREAT | O_WRONLY | O_APPEND, 0600);
    file = open(values[2], O_CREAT | O_RDWR | O_DIRECT, 0600);
    uint64_t *piece = aligned_alloc(4096, PIECE);
    for (uint64_t number = 0; number < PIECES; number++) {
        for (uint64_t at = 0; at < PIECE / 8; at++)
            piece[at] = number << 32 | at;
        if (pwrite(file, piece, PIECE, number * PIECE) != PIECE)
            return 4;
    }
    for (uintptr_t number = 1; number <= THREADS; number++) {
        pthread_t thread;
        pthread_create(&thread, NULL, work, (void *)number);
    }
    dprintf(log_file, "ready\n");
    for (;;)
        pause();
}
