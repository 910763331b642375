// Runs one method of a .pte as plan.h says. It is built against the headers and libraries of ExecuTorch's own wheel.

#include "plan.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/platform/runtime.h>

#include <memory>
#include <string>
#include <vector>

// libexecutorch_threadpool.so has it; the wheel leaves its header out.
namespace executorch::extension::threadpool {
class ThreadPool {
   public:
    bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool *get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

struct Loaded {
    Loaded(const std::string &path, const std::string &method) : module(path, Module::LoadMode::Mmap), entry(method) {}

    Module module;
    std::string entry;
    std::vector<std::vector<float>> values;  // of each input
    std::vector<TensorPtr> tensors;          // views of them
    std::vector<EValue> inputs, outputs;
};

void add_input(Loaded &loaded, const executorch::runtime::MethodMeta &method, int number, const input &expected) {
    const auto meta = method.input_tensor_meta(static_cast<size_t>(number));
    if (!meta.ok())
        fail(CANNOT_LOAD, "Input %d of %s is no tensor.", number, loaded.entry.c_str());
    const std::vector<executorch::aten::SizesType> sizes(meta->sizes().begin(), meta->sizes().end());
    size_t floats = 1;
    for (const auto size : sizes)
        floats *= static_cast<size_t>(size);
    if (floats != expected.floats || meta->scalar_type() != executorch::aten::ScalarType::Float)
        fail(CANNOT_LOAD, "Input %s of %s is not %zu floats.", expected.name, loaded.entry.c_str(), expected.floats);
    loaded.values.emplace_back(floats);
    loaded.tensors.push_back(from_blob(loaded.values.back().data(), sizes));
    loaded.inputs.emplace_back(loaded.tensors.back());
}

// A method keeps a pointer into the pool with which it was loaded, so that the pool comes first.
void prepare(const plan *plan) {
    executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(static_cast<uint32_t>(plan->threads));
}

void *load(const plan *plan) {
    auto loaded = std::make_unique<Loaded>(plan->model, plan->entry);
    const Error error = loaded->module.load_method(plan->entry);
    if (error != Error::Ok)
        fail(CANNOT_LOAD, "ExecuTorch cannot load %s of %s: error %d.", plan->entry, plan->model, static_cast<int>(error));
    const auto method = loaded->module.method_meta(plan->entry);
    if (!method.ok() || method->num_inputs() != static_cast<size_t>(plan->input_count) ||
        method->num_outputs() != static_cast<size_t>(plan->output_count))
        fail(CANNOT_LOAD, "%s has other inputs or outputs than the plan.", plan->entry);
    for (int i = 0; i < plan->input_count; i++)
        add_input(*loaded, method.get(), i, plan->inputs[i]);
    return loaded.release();
}

void give(void *loaded, int input, const float *values) {
    auto &held = static_cast<Loaded *>(loaded)->values[static_cast<size_t>(input)];
    std::copy(values, values + held.size(), held.begin());
}

const executorch::aten::Tensor output_of(void *loaded, int output) {
    return static_cast<Loaded *>(loaded)->outputs[static_cast<size_t>(output)].toTensor();
}

void renew(void *loaded, int input, int output) {
    give(loaded, input, output_of(loaded, output).const_data_ptr<float>());
}

void call(void *loaded) {
    auto *all = static_cast<Loaded *>(loaded);
    auto result = all->module.execute(all->entry, all->inputs);
    if (!result.ok())
        fail(CANNOT_RUN, "A call of %s failed: error %d.", all->entry.c_str(), static_cast<int>(result.error()));
    all->outputs = std::move(*result);
}

void take(void *loaded, int output, float *values) {
    const auto tensor = output_of(loaded, output);
    std::copy(tensor.const_data_ptr<float>(), tensor.const_data_ptr<float>() + tensor.numel(), values);
}

void release(void *loaded) { delete static_cast<Loaded *>(loaded); }

}  // namespace

int main(int argument_count, char **arguments) {
    const runtime executorch_runtime = {RUNTIME, prepare, load, give, renew, call, take, release};
    executorch::runtime::runtime_init();
    return follow_plan(&executorch_runtime, argument_count, arguments);
}
