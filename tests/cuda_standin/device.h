// What the GPU that is not there says of itself: an H100, whose numbers decide how Triton and inductor tile.
#pragma once
#define MAJOR 9
#define MINOR 0
#define MULTIPROCESSORS 132
#define SHARED_PER_BLOCK 49152
#define SHARED_PER_BLOCK_OPTIN 232448
#define SHARED_PER_MULTIPROCESSOR 233472
#define REGISTERS 65536
#define CLOCK_KHZ 1980000
#define MEMORY_CLOCK_KHZ 2619000
#define MEMORY_BUS_BITS 5120
#define VERSION 13000
#define EXPORT __attribute__((visibility("default")))
