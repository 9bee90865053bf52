// Counts a program's calls of the CUDA driver by name, candle's and cuBLAS's among them, and prints them when it ends.
// Needs CUPTI (part of the toolkit, or of the wheel nvidia-cuda-cupti). Two runs that decode different numbers of tokens
// give the calls of a token by their difference.
//
//   gcc -shared -fPIC -O2 -I$CUPTI/include -I$CUDA_HOME/include count_calls.c -o count_calls.so -L$CUPTI/lib -lcupti
//   CUDA_INJECTION64_PATH=$PWD/count_calls.so gpu/evals speed ..
#include <cupti.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CALLS = 4096 };
static _Atomic unsigned long counts[MAX_CALLS];
static const char *_Atomic names[MAX_CALLS];

static void CUPTIAPI count(void *user, CUpti_CallbackDomain domain, CUpti_CallbackId id, const void *data) {
  const CUpti_CallbackData *call = data;
  if (call->callbackSite != CUPTI_API_ENTER || id >= MAX_CALLS) return;
  atomic_store(&names[id], call->functionName);
  atomic_fetch_add(&counts[id], 1);
}

static void print(void) {
  for (int i = 0; i < MAX_CALLS; i++)
    if (counts[i] > 0) fprintf(stderr, "calls %lu %s\n", (unsigned long)counts[i], names[i]);
}

// The driver calls this when it starts.
int InitializeInjection(void) {
  CUpti_SubscriberHandle subscriber;
  if (cuptiSubscribe(&subscriber, count, NULL) != CUPTI_SUCCESS) return 0;
  cuptiEnableDomain(1, subscriber, CUPTI_CB_DOMAIN_DRIVER_API);
  atexit(print);
  return 1;
}
