// Adds up a program's time on the device by kernel, candle's and cuBLAS's among them, and prints it when it ends.
// Needs CUPTI (part of the toolkit, or of the wheel nvidia-cuda-cupti). Copies and fills stand under names of their own;
// "span" is the time from the first start to the last end, "gaps" what of it lies between two records.
//
//   gcc -shared -fPIC -O2 -I$CUPTI/include -I$CUDA_HOME/include kernel_times.c -o kernel_times.so -L$CUPTI/lib -lcupti
//   CUDA_INJECTION64_PATH=$PWD/kernel_times.so gpu/bench_cuda layer
#include <cupti.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_NAMES = 4096, BUFFER_BYTES = 8 << 20, PRINTED = 45 };

typedef struct {
  char *name;
  unsigned long count;
  double ms;
} Entry;

static Entry entries[MAX_NAMES];
static int used;
static uint64_t first_start = UINT64_MAX, last_end;
static double gaps_ms;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void add(const char *name, uint64_t start, uint64_t end) {
  int i = 0;
  while (i < used && strcmp(entries[i].name, name) != 0) i++;
  if (i == used) {
    if (used == MAX_NAMES) return;
    entries[used++].name = strdup(name);
  }
  entries[i].count++;
  entries[i].ms += (end - start) * 1e-6;
  if (first_start == UINT64_MAX) first_start = start;
  else if (start > last_end) gaps_ms += (start - last_end) * 1e-6;
  if (end > last_end) last_end = end;
}

static void CUPTIAPI requested(uint8_t **buffer, size_t *size, size_t *max_records) {
  *buffer = aligned_alloc(8, BUFFER_BYTES);
  *size = *buffer ? BUFFER_BYTES : 0;
  *max_records = 0;
}

static void CUPTIAPI completed(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
  CUpti_Activity *record = NULL;
  pthread_mutex_lock(&lock);
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const CUpti_ActivityKernel10 *kernel = (const void *)record;
      add(kernel->name, kernel->start, kernel->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const CUpti_ActivityMemcpy6 *copy = (const void *)record;
      static const char *const kinds[] = {"copy", "copy host to device", "copy device to host"};
      const int kind = copy->copyKind;
      add(kind == CUPTI_ACTIVITY_MEMCPY_KIND_DTOD ? "copy on device" : kinds[kind <= 2 ? kind : 0], copy->start, copy->end);
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
      const CUpti_ActivityMemset4 *fill = (const void *)record;
      add("fill", fill->start, fill->end);
    }
  }
  pthread_mutex_unlock(&lock);
  free(buffer);
}

static int by_time(const void *a, const void *b) {
  const double x = ((const Entry *)a)->ms, y = ((const Entry *)b)->ms;
  return x < y ? 1 : x > y ? -1 : 0;
}

static void print(void) {
  cuptiActivityFlushAll(1);
  pthread_mutex_lock(&lock);
  qsort(entries, used, sizeof(Entry), by_time);
  double total = 0.0;
  unsigned long count = 0;
  for (int i = 0; i < used; i++) total += entries[i].ms, count += entries[i].count;
  const double span = used ? (last_end - first_start) * 1e-6 : 0.0;
  fprintf(stderr, "device %.1f ms in %lu records, span %.1f ms, gaps %.1f ms\n", total, count, span, gaps_ms);
  for (int i = 0; i < used && i < PRINTED; i++)
    fprintf(stderr, "%9.2f ms %7lu x %8.1f us  %.90s\n", entries[i].ms, entries[i].count,
            entries[i].ms * 1e3 / entries[i].count, entries[i].name);
  pthread_mutex_unlock(&lock);
}

// The driver calls this when it starts.
int InitializeInjection(void) {
  cuptiActivityRegisterCallbacks(requested, completed);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMSET);
  atexit(print);
  return 1;
}
