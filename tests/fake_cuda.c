/* A CUDA driver that has no device: it keeps contexts, modules and functions apart as the real one does, and records every launch.

   The tests set what a device is like and which call fails, and say how many bytes each parameter of a kernel has, which the real
   driver reads from the binary. A launch is written down as one line:

       launch <name> ctx=<n> image=<bytes> grid=<x,y,z> block=<x,y,z> shared=<n> allowed=<n> stream=<n> parameters=<hex,hex,...>
*/
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
typedef struct { int device; } Context;
typedef struct { Context *context; char image[16]; } Module;
typedef struct { Module *module; char name[64]; int allowed; } Function;

static Context contexts[MOST];
static __thread Context *stack[MOST];
static __thread int depth;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char text[1 << 20];
static size_t written;
static int devices = 2, major_ = 9, minor_ = 0, shared_optin = 232448, cores = 132, blocks = 2, failure;
static char failing[64];
static int sizes[MOST], parameters;

static void say(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (written < sizeof text - 1) written += vsnprintf(text + written, sizeof text - written, format, arguments);
  va_end(arguments);
}
static int fails(const char *call) { return strcmp(call, failing) ? 0 : failure; }
static Context *now(void) { return depth ? stack[depth - 1] : NULL; }

const char *fake_log(void) { return text; }
void fake_forget(void) { written = 0; text[0] = 0; }
void fake_device(int count, int major, int minor, int optin, int sms, int each) {
  devices = count; major_ = major; minor_ = minor; shared_optin = optin; cores = sms; blocks = each;
}
void fake_failure(const char *call, int code) { snprintf(failing, sizeof failing, "%s", call); failure = code; }
void fake_parameters(const int *bytes, int count) { memcpy(sizes, bytes, sizeof(int) * count); parameters = count; }
int fake_depth(void) { return depth; }

int cuInit(unsigned flags) { return devices ? fails("cuInit") : 100; }
int cuGetErrorName(int code, const char **name) {
  static const struct { int code; const char *name; } names[] = {
    {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"}, {100, "CUDA_ERROR_NO_DEVICE"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
    {200, "CUDA_ERROR_INVALID_IMAGE"}, {201, "CUDA_ERROR_INVALID_CONTEXT"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
    {218, "CUDA_ERROR_INVALID_PTX"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {500, "CUDA_ERROR_NOT_FOUND"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"}, {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (names[i].code == code) { *name = names[i].name; return 0; }
  *name = NULL;
  return 1;
}
int cuDeviceGet(int *device, int number) { if (number < 0 || number >= devices) return 101; *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
    case 16: *value = cores; return 0;
    case 75: *value = major_; return 0;
    case 76: *value = minor_; return 0;
    case 97: *value = shared_optin; return 0;
    default: return 1;
  }
}
int cuDevicePrimaryCtxRetain(Context **context, int device) {
  contexts[device].device = device;
  *context = &contexts[device];
  say("retain %d\n", device);
  return fails("cuDevicePrimaryCtxRetain");
}
int cuCtxGetCurrent(Context **context) { *context = now(); return 0; }
int cuCtxSetCurrent(Context *context) { if (depth) depth--; stack[depth++] = context; return 0; }
int cuCtxPushCurrent_v2(Context *context) { stack[depth++] = context; return 0; }
int cuCtxPopCurrent_v2(Context **context) { if (!depth) return 201; *context = stack[--depth]; return 0; }
int cuModuleLoadData(Module **module, const char *image) {
  if (fails("cuModuleLoadData")) return failure;
  if (!now()) return 201;
  int ptx = strstr(image, ".entry") != NULL;
  if (!ptx && memcmp(image, "\177ELF", 4)) return 200;
  *module = calloc(1, sizeof(Module));
  (*module)->context = now();
  strcpy((*module)->image, ptx ? "ptx" : "cubin");
  return 0;
}
int cuModuleGetFunction(Function **function, Module *module, const char *name) {
  if (fails("cuModuleGetFunction")) return failure;
  *function = calloc(1, sizeof(Function));
  (*function)->module = module;
  (*function)->allowed = 49152;
  snprintf((*function)->name, sizeof (*function)->name, "%s", name);
  say("function %s ctx=%d image=%s\n", name, module->context->device, module->image);
  return 0;
}
int cuFuncGetAttribute(int *value, int attribute, Function *function) {
  switch (attribute) {
    case 1: *value = 16; return 0;
    case 3: *value = 0; return 0;
    case 4: *value = 168; return 0;
    default: return 1;
  }
}
int cuFuncSetCacheConfig(Function *function, int config) { return config == 1 ? 0 : 1; }
int cuFuncSetAttribute(Function *function, int attribute, int value) {
  if (attribute != 8 || value + 16 > shared_optin) return 1;
  function->allowed = value;
  return fails("cuFuncSetAttribute");
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *found, Function *function, int threads, size_t shared) {
  *found = blocks;
  return threads > 0 ? 0 : 1;
}
int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **values, void **extra) {
  if (fails("cuLaunchKernel")) return failure;
  if (!now()) return 201;
  if (now() != function->module->context) return 400;
  if ((int)shared > function->allowed || extra) return 1;
  pthread_mutex_lock(&lock);
  say("launch %s ctx=%d image=%s grid=%u,%u,%u block=%u,%u,%u shared=%u allowed=%d stream=%lu parameters=", function->name,
      now()->device, function->module->image, gx, gy, gz, bx, by, bz, shared, function->allowed, (unsigned long)stream);
  for (int i = 0; i < parameters; i++) {
    if (i) say(",");
    for (int b = 0; b < sizes[i]; b++) say("%02x", ((unsigned char *)values[i])[b]);
  }
  say("\n");
  pthread_mutex_unlock(&lock);
  return 0;
}
