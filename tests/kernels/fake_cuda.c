/* A CUDA driver without a GPU: records what it is asked to do. test_launcher.py compiles and reads it. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { MAX_IMAGE = 1 << 20, MAX_LOG = 1 << 16, MAX_PARAMS = 64 };

typedef int result;

typedef struct {
    char log[MAX_LOG];                     /* names of the calls, each followed by a space */
    char fail_call[64];                    /* the call that fails */
    int fail_code;                         /* and how */
    int version;                           /* of the driver */
    uint64_t context;                      /* current context of every thread */
    uint32_t image_bytes;                  /* how many bytes of an image are kept: it does not tell its length */
    unsigned char image[MAX_IMAGE];        /* the last one loaded */
    char symbol[256];                      /* the last function asked for */
    int attribute, attribute_value;        /* the last one set */
    uint64_t attribute_function;
    uint32_t modules;                      /* loaded so far */
    uint32_t param_count;                  /* parameters of a launch, and the bytes of each */
    uint32_t param_bytes[MAX_PARAMS];
    unsigned char params[MAX_PARAMS][8];   /* those of the last launch */
    uint64_t function, stream;
    uint32_t grid[3], block[3], shared;
    uint64_t extra;
} state;

state fake;

static result called(const char *name) {
    size_t used = strlen(fake.log);
    snprintf(fake.log + used, MAX_LOG - used, "%s ", name);
    return strcmp(name, fake.fail_call) == 0 ? fake.fail_code : 0;
}

result cuDriverGetVersion(int *version) {
    *version = fake.version;
    return called("cuDriverGetVersion");
}

result cuGetErrorName(result code, const char **name) {
    if (code != 1 && code != 700) return 1;
    *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_ILLEGAL_ADDRESS";
    return 0;
}

result cuCtxGetCurrent(uint64_t *context) {
    *context = fake.context;
    return called("cuCtxGetCurrent");
}

result cuCtxSetCurrent(uint64_t context) {
    fake.context = context;
    return called("cuCtxSetCurrent");
}

result cuDeviceGet(int *device, int ordinal) {
    *device = 40 + ordinal;
    return called("cuDeviceGet");
}

result cuDevicePrimaryCtxRetain(uint64_t *context, int device) {
    *context = 0xC0DE000000000000u + (uint64_t)device;
    return called("cuDevicePrimaryCtxRetain");
}

result cuModuleLoadData(uint64_t *module, const void *image) {
    memcpy(fake.image, image, fake.image_bytes);
    *module = 0x1000u + fake.modules++;
    return called("cuModuleLoadData");
}

result cuModuleGetFunction(uint64_t *function, uint64_t module, const char *name) {
    snprintf(fake.symbol, sizeof fake.symbol, "%s", name);
    *function = 0xF000000000000000u + module;
    return called("cuModuleGetFunction");
}

result cuFuncSetAttribute(uint64_t function, int attribute, int value) {
    fake.attribute_function = function;
    fake.attribute = attribute;
    fake.attribute_value = value;
    return called("cuFuncSetAttribute");
}

result cuLaunchKernel(uint64_t function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, uint64_t stream, void **params, void **extra) {
    fake.function = function;
    fake.grid[0] = gx, fake.grid[1] = gy, fake.grid[2] = gz;
    fake.block[0] = bx, fake.block[1] = by, fake.block[2] = bz;
    fake.shared = shared;
    fake.stream = stream;
    fake.extra = (uint64_t)(uintptr_t)extra;
    memset(fake.params, 0xAA, sizeof fake.params);
    for (uint32_t i = 0; i < fake.param_count; i++) memcpy(fake.params[i], params[i], fake.param_bytes[i]);
    return called("cuLaunchKernel");
}
