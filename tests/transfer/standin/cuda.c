/* Stands in for CUDA's driver, in tests: "device memory" is shared memory of the host, which other processes can open.
   As strict as the documentation: a context must be current, a handle is of the start of an allocation, is opened once
   at a time and never by its own process (unless LANEWISE_STANDIN_OWN is set), and peers are reached by flag 1 only. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, NO_DEVICE = 101, INVALID_CONTEXT = 201, ALREADY_MAPPED = 208, INVALID_HANDLE = 400 };
enum { MOST = 4096 };
typedef unsigned long long Address;
typedef struct { char reserved[64]; } Handle;
typedef struct { char magic[8]; int pid, fd; size_t size; } Named;

static struct { Address base; size_t size; int fd; Named opened; } table[MOST];
static __thread int depth;
static void *const CONTEXT = (void *)0x1234567890;

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : OK; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? NO_DEVICE : OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return device ? NO_DEVICE : OK; }
int cuGetErrorString(int code, const char **words) {
  *words = code == INVALID_VALUE     ? "invalid argument"
           : code == NO_DEVICE       ? "no CUDA-capable device is detected"
           : code == INVALID_CONTEXT ? "invalid device context"
           : code == ALREADY_MAPPED  ? "resource already mapped"
           : code == INVALID_HANDLE  ? "invalid resource handle"
                                     : NULL;
  return *words ? OK : INVALID_VALUE;
}
int cuCtxPushCurrent_v2(void *context) { return context == CONTEXT ? (depth++, OK) : INVALID_CONTEXT; }
int cuCtxPopCurrent_v2(void **context) { *context = CONTEXT; return depth ? (depth--, OK) : INVALID_CONTEXT; }

static Address add(int fd, size_t size, Named opened) {
  for (int i = 0; i < MOST; i++)
    if (!table[i].base) {
      void *base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
      if (base == MAP_FAILED) return 0;
      table[i].base = (Address)base, table[i].size = size, table[i].fd = fd, table[i].opened = opened;
      return table[i].base;
    }
  return 0;
}

/* For tests: memory, and what must be balanced at their end. */
Address standin_allocate(size_t size) {
  int fd = memfd_create("device", 0);
  return ftruncate(fd, size) ? 0 : add(fd, size, (Named){0});
}
int standin_depth(void) { return depth; }
int standin_opened(void) {
  int count = 0;
  for (int i = 0; i < MOST; i++) count += table[i].base && table[i].opened.pid;
  return count;
}

int cuMemGetAddressRange_v2(Address *base, size_t *size, Address at) {
  if (!depth) return INVALID_CONTEXT;
  for (int i = 0; i < MOST; i++)
    if (table[i].base && at >= table[i].base && at < table[i].base + table[i].size) {
      *base = table[i].base, *size = table[i].size;
      return OK;
    }
  return INVALID_VALUE;
}
int cuIpcGetMemHandle(Handle *handle, Address at) {
  if (!depth) return INVALID_CONTEXT;
  for (int i = 0; i < MOST; i++)
    if (table[i].base == at && !table[i].opened.pid) {
      Named named = {"STANDIN", getpid(), table[i].fd, table[i].size};
      memset(handle, 0, sizeof *handle);
      memcpy(handle, &named, sizeof named);
      return OK;
    }
  return INVALID_VALUE;
}
int cuIpcOpenMemHandle_v2(Address *at, Handle handle, unsigned flags) {
  Named named;
  char path[64];
  memcpy(&named, &handle, sizeof named);
  if (!depth) return INVALID_CONTEXT;
  if (flags != 1) return INVALID_VALUE;
  if (memcmp(named.magic, "STANDIN", 8)) return INVALID_HANDLE;
  if (named.pid == getpid() && !getenv("LANEWISE_STANDIN_OWN")) return INVALID_CONTEXT;
  for (int i = 0; i < MOST; i++)
    if (table[i].base && !memcmp(&table[i].opened, &named, sizeof named)) return ALREADY_MAPPED;
  snprintf(path, sizeof path, "/proc/%d/fd/%d", named.pid, named.fd);
  int fd = open(path, O_RDWR);
  if (fd < 0) return INVALID_HANDLE;
  *at = add(fd, named.size, named);
  return *at ? OK : INVALID_VALUE;
}
int cuIpcCloseMemHandle(Address at) {
  if (!depth) return INVALID_CONTEXT;
  for (int i = 0; i < MOST; i++)
    if (table[i].base == at && table[i].opened.pid) {
      munmap((void *)at, table[i].size);
      close(table[i].fd);
      memset(&table[i], 0, sizeof table[i]);
      return OK;
    }
  return INVALID_VALUE;
}
