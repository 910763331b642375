/* Runs one signature of a .tflite as plan.h says, on the CPU with XNNPACK.
 *
 * LiteRT's wheel has the library but no headers; these are our own declarations of what we call, of version 2.3.0. Other
 * versions have other ones.
 */
#include "plan.h"

enum { FLOAT32 = 1, CPU = 1, READ = 0, WRITE = 1, MOST_DIMENSIONS = 8 };

typedef void *handle;

struct layout {
    unsigned rank : 7, has_strides : 1;
    int32_t dimensions[MOST_DIMENSIONS];
    uint32_t strides[MOST_DIMENSIONS];
};

struct tensor_type {
    int element;
    struct layout layout;
};

int LiteRtCreateEnvironment(int options, const void *values, handle *environment);
void LiteRtDestroyEnvironment(handle environment);
int LiteRtCreateModelFromFile(handle environment, const char *path, handle *model);
void LiteRtDestroyModel(handle model);
int LiteRtCreateOptions(handle *options);
void LiteRtDestroyOptions(handle options);
int LiteRtSetOptionsHardwareAccelerators(handle options, int accelerators);
int LiteRtCreateOpaqueOptions(const char *name, void *content, void (*release)(void *), handle *opaque);
int LiteRtAddOpaqueOptions(handle options, handle opaque);
int LiteRtCreateCompiledModel(handle environment, handle model, handle options, handle *compiled);
void LiteRtDestroyCompiledModel(handle compiled);
int LiteRtGetNumModelSignatures(handle model, size_t *count);
int LiteRtGetModelSignature(handle model, size_t number, handle *signature);
int LiteRtGetSignatureKey(handle signature, const char **key);
int LiteRtGetNumSignatureInputs(handle signature, size_t *count);
int LiteRtGetNumSignatureOutputs(handle signature, size_t *count);
int LiteRtGetSignatureInputName(handle signature, size_t number, const char **name);
int LiteRtGetSignatureOutputName(handle signature, size_t number, const char **name);
int LiteRtGetCompiledModelInputTensorLayout(handle compiled, size_t signature, size_t number, struct layout *layout);
int LiteRtGetCompiledModelOutputTensorLayouts(handle compiled, size_t signature, size_t count, struct layout *layouts, bool update);
int LiteRtGetCompiledModelInputBufferRequirements(handle compiled, size_t signature, size_t number, handle *requirements);
int LiteRtGetCompiledModelOutputBufferRequirements(handle compiled, size_t signature, size_t number, handle *requirements);
int LiteRtCreateManagedTensorBufferFromRequirements(handle environment, const struct tensor_type *type, handle requirements,
                                                    handle *buffer);
void LiteRtDestroyTensorBuffer(handle buffer);
int LiteRtLockTensorBuffer(handle buffer, void **memory, int how);
int LiteRtUnlockTensorBuffer(handle buffer);
int LiteRtRunCompiledModel(handle compiled, size_t signature, size_t input_count, handle *inputs, size_t output_count,
                           handle *outputs);

struct loaded {
    const struct plan *plan;
    handle environment, model, compiled;
    size_t signature;
    handle inputs[MOST_TENSORS], outputs[MOST_TENSORS]; /* buffers in the order of the signature */
    size_t input_at[MOST_TENSORS], output_at[MOST_TENSORS]; /* of each tensor of the plan its place there */
};

static void must(int status, int code, const char *what)
{
    if (status)
        fail(code, "LiteRT cannot %s: status %d.", what, status);
}

static handle find_signature(struct loaded *all)
{
    size_t count = 0;
    must(LiteRtGetNumModelSignatures(all->model, &count), CANNOT_LOAD, "count the signatures");
    for (size_t number = 0; number < count; number++) {
        handle signature = NULL;
        const char *key = NULL;
        must(LiteRtGetModelSignature(all->model, number, &signature), CANNOT_LOAD, "read a signature");
        must(LiteRtGetSignatureKey(signature, &key), CANNOT_LOAD, "read a signature's name");
        if (!strcmp(key, all->plan->entry)) {
            all->signature = number;
            return signature;
        }
    }
    fail(CANNOT_LOAD, "%s has no signature %s.", all->plan->model, all->plan->entry);
}

static handle make_buffer(struct loaded *all, const char *name, size_t floats, const struct layout *layout, handle requirements)
{
    struct tensor_type type = {FLOAT32, *layout};
    handle buffer = NULL;
    size_t found = 1;
    for (unsigned i = 0; i < layout->rank; i++)
        found *= (size_t)layout->dimensions[i];
    if (found != floats)
        fail(CANNOT_LOAD, "%s of %s has %zu values, not %zu.", name, all->plan->entry, found, floats);
    must(LiteRtCreateManagedTensorBufferFromRequirements(all->environment, &type, requirements, &buffer), CANNOT_LOAD,
         "make a buffer");
    return buffer;
}

/* The signature's order need not be the plan's: tensors are matched by name. */
static void make_inputs(struct loaded *all, handle signature)
{
    const struct plan *plan = all->plan;
    size_t count = 0;
    must(LiteRtGetNumSignatureInputs(signature, &count), CANNOT_LOAD, "count the inputs");
    if (count != (size_t)plan->input_count)
        fail(CANNOT_LOAD, "%s has %zu inputs, not %d.", plan->entry, count, plan->input_count);
    for (size_t number = 0; number < count; number++) {
        const char *name = NULL;
        struct layout layout;
        handle requirements = NULL;
        int i = 0;
        must(LiteRtGetSignatureInputName(signature, number, &name), CANNOT_LOAD, "name an input");
        while (i < plan->input_count && strcmp(plan->inputs[i].name, name))
            i++;
        if (i == plan->input_count)
            fail(CANNOT_LOAD, "%s has an input %s, which the plan does not know.", plan->entry, name);
        must(LiteRtGetCompiledModelInputTensorLayout(all->compiled, all->signature, number, &layout), CANNOT_LOAD, "measure an input");
        must(LiteRtGetCompiledModelInputBufferRequirements(all->compiled, all->signature, number, &requirements), CANNOT_LOAD,
             "say what an input needs");
        all->inputs[number] = make_buffer(all, name, plan->inputs[i].floats, &layout, requirements);
        all->input_at[i] = number;
    }
}

static void make_outputs(struct loaded *all, handle signature)
{
    static struct layout layouts[MOST_TENSORS];
    const struct plan *plan = all->plan;
    size_t count = 0;
    must(LiteRtGetNumSignatureOutputs(signature, &count), CANNOT_LOAD, "count the outputs");
    if (count != (size_t)plan->output_count)
        fail(CANNOT_LOAD, "%s has %zu outputs, not %d.", plan->entry, count, plan->output_count);
    must(LiteRtGetCompiledModelOutputTensorLayouts(all->compiled, all->signature, count, layouts, false), CANNOT_LOAD,
         "measure the outputs");
    for (size_t number = 0; number < count; number++) {
        const char *name = NULL;
        handle requirements = NULL;
        int o = 0;
        must(LiteRtGetSignatureOutputName(signature, number, &name), CANNOT_LOAD, "name an output");
        while (o < plan->output_count && strcmp(plan->outputs[o].name, name))
            o++;
        if (o == plan->output_count)
            fail(CANNOT_LOAD, "%s has an output %s, which the plan does not know.", plan->entry, name);
        must(LiteRtGetCompiledModelOutputBufferRequirements(all->compiled, all->signature, number, &requirements), CANNOT_LOAD,
             "say what an output needs");
        all->outputs[number] = make_buffer(all, name, plan->outputs[o].floats, &layouts[number], requirements);
        all->output_at[o] = number;
    }
}

static handle make_options(int threads)
{
    handle options = NULL, xnnpack = NULL;
    char *text = NULL;
    if (asprintf(&text, "num_threads = %d\n", threads) < 0)
        fail(CANNOT_LOAD, "There is no memory for the options.");
    must(LiteRtCreateOptions(&options), CANNOT_LOAD, "make options");
    must(LiteRtSetOptionsHardwareAccelerators(options, CPU), CANNOT_LOAD, "choose the CPU");
    must(LiteRtCreateOpaqueOptions("xnnpack", text, free, &xnnpack), CANNOT_LOAD, "make XNNPACK's options");
    must(LiteRtAddOpaqueOptions(options, xnnpack), CANNOT_LOAD, "set the number of threads");
    return options;
}

static void *load(const struct plan *plan)
{
    struct loaded *all = (struct loaded *)zeros(1, sizeof *all);
    handle options = make_options(plan->threads);
    all->plan = plan;
    must(LiteRtCreateEnvironment(0, NULL, &all->environment), CANNOT_LOAD, "make an environment");
    must(LiteRtCreateModelFromFile(all->environment, plan->model, &all->model), CANNOT_LOAD, "read the artifact");
    must(LiteRtCreateCompiledModel(all->environment, all->model, options, &all->compiled), CANNOT_LOAD, "compile the artifact");
    handle signature = find_signature(all);
    make_inputs(all, signature);
    make_outputs(all, signature);
    LiteRtDestroyOptions(options);
    return all;
}

static void copy(handle from, handle to, float *memory, const float *values, size_t floats)
{
    void *source = NULL, *target = NULL;
    if (from)
        must(LiteRtLockTensorBuffer(from, &source, READ), CANNOT_RUN, "read a buffer");
    if (to)
        must(LiteRtLockTensorBuffer(to, &target, WRITE), CANNOT_RUN, "write a buffer");
    memcpy(to ? target : memory, from ? source : values, floats * sizeof *values);
    if (from)
        must(LiteRtUnlockTensorBuffer(from), CANNOT_RUN, "give a buffer back");
    if (to)
        must(LiteRtUnlockTensorBuffer(to), CANNOT_RUN, "give a buffer back");
}

static void give(void *loaded, int input, const float *values)
{
    struct loaded *all = (struct loaded *)loaded;
    copy(NULL, all->inputs[all->input_at[input]], NULL, values, all->plan->inputs[input].floats);
}

static void renew(void *loaded, int input, int output)
{
    struct loaded *all = (struct loaded *)loaded;
    handle from = all->outputs[all->output_at[output]], to = all->inputs[all->input_at[input]];
    copy(from, to, NULL, NULL, all->plan->inputs[input].floats);
}

static void take(void *loaded, int output, float *values)
{
    struct loaded *all = (struct loaded *)loaded;
    copy(all->outputs[all->output_at[output]], NULL, values, NULL, all->plan->outputs[output].floats);
}

static void call(void *loaded)
{
    struct loaded *all = (struct loaded *)loaded;
    must(LiteRtRunCompiledModel(all->compiled, all->signature, (size_t)all->plan->input_count, all->inputs,
                                (size_t)all->plan->output_count, all->outputs),
         CANNOT_RUN, "run the signature");
}

static void release(void *loaded)
{
    struct loaded *all = (struct loaded *)loaded;
    for (int i = 0; i < all->plan->input_count; i++)
        LiteRtDestroyTensorBuffer(all->inputs[i]);
    for (int o = 0; o < all->plan->output_count; o++)
        LiteRtDestroyTensorBuffer(all->outputs[o]);
    LiteRtDestroyCompiledModel(all->compiled);
    LiteRtDestroyModel(all->model);
    LiteRtDestroyEnvironment(all->environment);
    free(all);
}

int main(int argument_count, char **arguments)
{
    const struct runtime litert = {RUNTIME, NULL, load, give, renew, call, take, release};
    return follow_plan(&litert, argument_count, arguments);
}
