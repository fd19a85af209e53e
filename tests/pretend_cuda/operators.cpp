// Operators of CUDA tensors on the pretend CUDA runtime: each is queued on the current stream, where the CPU's kernel
// computes it over the same bytes. Outputs come from torch's own CUDA allocator. Copies between host and device, views,
// allocation and reads of scalars stay torch's own CUDA code.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/copy_native.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <set>
#include <sstream>
#include <unordered_map>

struct PretendAccess {
  const void* pointer;
  size_t size;
  int is_write;
};
extern "C" int pretend_launch(cudaStream_t, const char*, const PretendAccess*, size_t, void (*)(void*), void*);
extern "C" int pretend_float_products();
extern "C" void pretend_crash(const char*);

namespace {
using c10::IValue;
using torch::jit::Stack;

struct Bare {  // what a tensor is, without holding its memory
  void* data;
  std::vector<int64_t> sizes, strides;
  at::ScalarType dtype;

  explicit Bare(const at::Tensor& t) : data(t.data_ptr()), sizes(t.sizes().vec()), strides(t.strides().vec()), dtype(t.scalar_type()) {}
  at::Tensor on_host() const {
    return at::from_blob(data, sizes, strides, at::TensorOptions().dtype(dtype).device(at::kCPU));
  }
};

size_t extent(const at::Tensor& t) {
  if (t.numel() == 0) return 0;
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return (last + 1) * t.element_size();
}

at::Tensor meta_of(const at::Tensor& t) {
  return at::empty_strided(t.sizes(), t.strides(), at::TensorOptions().dtype(t.scalar_type()).device(at::kMeta));
}

// A copy of `value` in which each tensor on the GPU is replaced.
template <class Replace>
IValue mapped(const IValue& value, Replace replace) {
  if (value.isTensor()) return replace(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorList()) list.push_back(replace(t).toTensor());
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (std::optional<at::Tensor> t : value.toOptionalTensorList())
      list.push_back(t ? std::optional<at::Tensor>(replace(*t).toTensor()) : std::nullopt);
    return list;
  }
  return value;
}

template <class Visit>
void each_tensor(const IValue& value, Visit visit) {
  mapped(value, [&](const at::Tensor& t) { visit(t); return IValue(t); });
}

// Below autograd, inference and everything of Python's.
struct Below {
  at::AutoDispatchBelowADInplaceOrView below;
  c10::impl::ExcludeDispatchKeyGuard python{c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
                                                                 c10::DispatchKey::PythonDispatcher})};
};

struct Work {
  c10::OperatorHandle op;
  std::vector<IValue> arguments;              // without tensors of the GPU
  std::vector<std::vector<Bare>> tensors;     // of each argument, in order; empty for those without
  std::vector<Bare> outputs;                  // new tensors that results are copied to
  std::string name;

  // Results that are copied to `outputs` may have another type.
  bool is_in_float() const {
    static const std::set<std::string> products = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"};
    return pretend_float_products() && !outputs.empty() && products.count(name);
  }

  void run() {
    Below below;
    bool in_float = is_in_float();
    static thread_local bool once = (at::set_num_threads(1), true);
    (void)once;
    try {
      Stack stack;
      for (size_t i = 0; i < arguments.size(); ++i) {
        size_t next = 0;
        stack.push_back(mapped(arguments[i], [&](const at::Tensor& t) {
          if (!t.defined() || !t.is_meta()) return IValue(t);
          auto host = tensors[i][next++].on_host();
          return IValue(in_float && c10::isReducedFloatingType(t.scalar_type()) ? host.to(at::kFloat) : host);
        }));
      }
      op.callBoxed(&stack);
      size_t next = 0;
      if (!outputs.empty())
        for (auto& value : stack)
          each_tensor(value, [&](const at::Tensor& t) {
            if (t.defined()) outputs.at(next++).on_host().copy_(t);
          });
    } catch (const c10::Error& failure) {
      pretend_crash((name + ": " + std::string(failure.what_without_backtrace()).substr(0, 400)).c_str());
    } catch (const std::exception& failure) {
      pretend_crash((name + ": " + failure.what()).c_str());
    }
  }
};

bool writes(const c10::Argument& argument) { return argument.alias_info() && argument.alias_info()->isWrite(); }

struct Call {
  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  Stack& stack;
  size_t first;
  std::string name;
  c10::Device device{c10::kCUDA, 0};
  bool found = false, in_place = false;

  Call(const c10::OperatorHandle& op, Stack& stack)
      : op(op), schema(op.schema()), stack(stack), first(stack.size() - op.schema().arguments().size()), name(op.schema().name()) {
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      in_place |= writes(schema.arguments()[i]);
      each_tensor(stack[first + i], [&](const at::Tensor& t) {
        if (t.defined() && t.is_cuda()) found = true, device = t.device();
      });
      if (!found && stack[first + i].isDevice() && stack[first + i].toDevice().is_cuda()) device = stack[first + i].toDevice();
    }
    if (device.index() < 0) device = c10::Device(c10::kCUDA, c10::cuda::current_device());
  }

  // The call's arguments with other tensors, and on another device.
  template <class Replace>
  Stack with(Replace replace, c10::Device other) {
    Stack made;
    for (size_t i = first; i < stack.size(); ++i) {
      auto value = mapped(stack[i], replace);
      if (value.isDevice() && value.toDevice().is_cuda()) value = other;
      if (value.isGenerator()) value = IValue();
      made.push_back(value);
    }
    return made;
  }

  void finish(const std::vector<IValue>& results) {
    stack.resize(first);
    for (auto& one : results) stack.push_back(one);
  }

  // What an operator that writes into its arguments returns: these.
  std::vector<IValue> written() {
    std::vector<IValue> results;
    std::vector<IValue> candidates;
    for (size_t i = 0; i < schema.arguments().size(); ++i)
      if (writes(schema.arguments()[i])) candidates.push_back(stack[first + i]);
    for (size_t i = 0; i < schema.returns().size() && i < candidates.size(); ++i) results.push_back(candidates[i]);
    return results;
  }

  void queue(const std::vector<IValue>& outputs) {
    auto work = std::make_unique<Work>(Work{op, {}, {}, {}, name});
    std::vector<PretendAccess> accesses;
    for (size_t i = 0; i < schema.arguments().size(); ++i) {
      auto& bare = work->tensors.emplace_back();
      bool write = writes(schema.arguments()[i]);
      auto value = mapped(stack[first + i], [&](const at::Tensor& t) {
        if (!t.defined()) return IValue(t);
        if (!t.is_cuda()) return IValue(t.clone());  // a scalar: its value at the launch counts
        bare.emplace_back(t);
        if (auto size = extent(t)) accesses.push_back({t.data_ptr(), size, write});
        return IValue(meta_of(t));
      });
      if (value.isDevice() && value.toDevice().is_cuda()) value = c10::Device(at::kCPU);
      if (value.isGenerator()) value = IValue();
      work->arguments.push_back(value);
    }
    for (auto& value : outputs)
      each_tensor(value, [&](const at::Tensor& t) {
        if (!t.defined()) return;
        work->outputs.emplace_back(t);
        if (auto size = extent(t)) accesses.push_back({t.data_ptr(), size, 1});
      });
    auto stream = c10::cuda::getCurrentCUDAStream(device.index());
    pretend_launch(stream.stream(), name.c_str(), accesses.data(), accesses.size(),
                    [](void* data) {
                      std::unique_ptr<Work> work(static_cast<Work*>(data));
                      work->run();
                    },
                    work.release());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Where outputs cannot be known beforehand: the stream is waited for, the CPU's kernel runs here.
  void run_here() {
    c10::cuda::stream_synchronize(c10::cuda::getCurrentCUDAStream(device.index()));
    auto made = with(
        [](const at::Tensor& t) { return t.defined() && t.is_cuda() ? IValue(Bare(t).on_host()) : IValue(t); }, at::kCPU);
    op.callBoxed(&made);
    if (in_place) return finish(written());
    std::vector<IValue> results;
    for (auto& value : made)
      results.push_back(mapped(value, [&](const at::Tensor& t) {
        if (!t.defined()) return IValue(t);
        auto moved = at::empty_strided(t.sizes(), t.strides(), t.options().device(device));
        memcpy(moved.data_ptr(), t.data_ptr(), extent(t));
        return IValue(moved);
      }));
    finish(results);
  }

  // What sizes and strides of the results follow from; none if values of tensors may be among it.
  std::optional<std::string> cause() {
    std::ostringstream text;
    text << std::hexfloat << op.operator_name();
    bool has_values = false;
    for (size_t i = first; i < stack.size(); ++i) {
      auto bare = mapped(stack[i], [&](const at::Tensor& t) {
        if (!t.defined()) text << " undefined";
        else text << ' ' << t.device() << t.scalar_type() << t.sizes() << t.strides() << t.unsafeGetTensorImpl()->is_wrapped_number();
        has_values |= t.defined() && !t.is_cuda() && t.numel() > 1;
        return IValue(at::Tensor());
      });
      text << '|';
      if (bare.isOptionalTensorList())
        for (std::optional<at::Tensor> t : bare.toOptionalTensorList()) text << t.has_value();
      if (!bare.isTensor() && !bare.isTensorList() && !bare.isOptionalTensorList()) text << bare.tagKind() << bare;
    }
    return has_values ? std::nullopt : std::optional(text.str());
  }

  // Sizes and strides of the results.
  std::optional<Stack> described() {
    static thread_local std::unordered_map<std::string, Stack> known;
    auto key = cause();
    if (!key) return computed_shapes();
    if (auto it = known.find(*key); it != known.end()) return it->second;
    auto shapes = computed_shapes();
    if (shapes) known.emplace(*key, *shapes);
    return shapes;
  }

  // From the operator on tensors without bytes; much of that is Python, and slow.
  std::optional<Stack> computed_shapes() {
    auto made = with(
        [](const at::Tensor& t) { return t.defined() && t.is_cuda() ? IValue(meta_of(t)) : IValue(t); }, at::kMeta);
    try {
      op.callBoxed(&made);
    } catch (const std::exception&) {  // sizes that depend on values (nonzero); what is truly wrong fails again below
      return std::nullopt;
    }
    for (auto& value : made)
      if (!value.isTensor() && !value.isTensorList()) return std::nullopt;
    return made;
  }
};

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  Call call(op, *stack);
  c10::cuda::CUDAGuard guard(call.device);
  Below below;
  bool random = false;
  for (auto& argument : call.schema.arguments()) random |= argument.name() == "generator";
  if (call.in_place) {
    bool out = false;
    for (auto& argument : call.schema.arguments()) out |= argument.is_out();
    if (out) {  // results get their size before they are written
      auto shapes = call.described();
      if (!shapes) return call.run_here();
      size_t i = 0;
      for (auto& value : call.written()) {
        auto& shape = shapes->at(i++);
        if (value.isTensor() && value.toTensor().sizes() != shape.toTensor().sizes()) value.toTensor().resize_(shape.toTensor().sizes());
      }
    }
    if (random) return call.run_here();
    auto results = call.written();
    call.queue({});
    return call.finish(results);
  }
  auto shapes = random ? std::nullopt : call.described();
  if (!shapes) return call.run_here();
  std::vector<IValue> outputs;
  for (auto& value : *shapes)
    outputs.push_back(mapped(value, [&](const at::Tensor& t) {
      if (!t.defined()) return IValue(t);
      return IValue(at::empty_strided(t.sizes(), t.strides(), t.options().device(call.device)));
    }));
  call.queue(outputs);
  call.finish(outputs);
}

// Copies between host and device, and those on the device that need no kernel, are torch's own.
at::Tensor& copy(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  bool kernel = self.is_cuda() && source.is_cuda() && self.numel() > 0 &&
                !(self.scalar_type() == source.scalar_type() && self.is_contiguous() && source.is_contiguous() && self.sizes() == source.sizes());
  if (!kernel) return at::native::copy_(self, source, non_blocking);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Stack stack{self, source, non_blocking};
  Call call(op, stack);
  c10::cuda::CUDAGuard guard(call.device);
  call.queue({});
  return self;
}

bool is_ours(const c10::OperatorHandle& op) {
  static const std::set<std::string> theirs = {
      "empty", "empty_strided", "resize_", "resize_as_", "set_", "as_strided", "view", "_reshape_alias", "record_stream", "is_pinned",
      "_pin_memory", "_local_scalar_dense", "copy_", "_copy_from", "_copy_from_and_resize", "is_set_to", "_efficientzerotensor",
      "unfold", "_fused_sdp_choice", "view_as_real", "view_as_complex", "alias", "_empty_affine_quantized", "_nested_view_from_buffer"};
  auto& schema = op.schema();
  if (schema.name().rfind("aten::", 0) != 0 || theirs.count(schema.name().substr(6))) return false;
  for (auto& value : schema.returns())  // views
    if (value.alias_info() && !value.alias_info()->isWrite()) return false;
  return true;
}

const int installed = [] {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  int count = 0;
  for (auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA) || !is_ours(*op)) continue;
    auto full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
    library.impl(full.substr(6).c_str(), torch::CppFunction::makeFromBoxedFunction<&compute>());
    ++count;
  }
  library.impl("copy_", TORCH_FN(copy));
  library.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&compute>());  // else it calls cuDNN
  return count;
}();
}  // namespace
extern "C" __attribute__((visibility("default"))) int pretend_operators() { return installed; }
