// A second device for the tests: it computes on the CPU, but behaves to PyTorch as a GPU does.
//
// Its tensors live in memory that no CPU tensor shares, and what mixes them with CPU tensors fails. Every operation falls
// back to the CPU's kernel. Counted are the operations, and the times that the host would wait for a GPU.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <unordered_set>
#include <utility>

namespace {

using at::Tensor;
using c10::IValue;
using torch::jit::Stack;

constexpr auto SECOND = c10::DeviceType::PrivateUse1;

// ---- State ----------------------------------------------------------------------------------------------------------

std::atomic<bool> plugged{false};
std::atomic<pid_t> owner{0};  // the process that first plugged the device in
std::atomic<int64_t> waits{0}, operations{0};

std::atomic<bool> logging{false};
py::object& logger() {
  static auto* callback = new py::object();  // never destroyed: Python is gone by then
  return *callback;
}

void log(const char* kind, const std::string& name) {
  if (!logging) {
    return;
  }
  py::gil_scoped_acquire gil;
  if (logger()) {
    logger()(kind, name);
  }
}

void count_wait(const std::string& name) {
  waits++;
  log("wait", name);
}

void count_operation(const std::string& name) {
  operations++;
  log("operation", name);
}

thread_local bool computing = false;  // inside an operation, whose own copies are not the program's
struct Computing {
  bool before = std::exchange(computing, true);
  ~Computing() {
    computing = before;
  }
};

// The errors of a machine without the device, without this one of its kind, and of a forked process.
void check_usable(std::optional<c10::Device> device = std::nullopt) {
  TORCH_CHECK(plugged, "No second device is available: it is not plugged in.");
  TORCH_CHECK(
      owner == getpid(),
      "Cannot re-initialize the second device in forked subprocess. ",
      "To use it with multiprocessing, you must use the 'spawn' start method");
  TORCH_CHECK(!device || device->index() <= 0, "second error: invalid device ordinal ", int(device->index()));
}

// ---- Memory ---------------------------------------------------------------------------------------------------------

void* allocate_bytes(size_t size) {
  return size ? std::aligned_alloc(64, (size + 63) / 64 * 64) : nullptr;
}

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 9
using MemoryOfDevice = c10::Allocator;
#else
// `torch.accelerator.empty_cache` and its like ask for this, and find nothing to do.
struct MemoryOfDevice : c10::DeviceAllocator {
  bool initialized() override {
    return false;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    return {};
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {}
};
#endif

struct DeviceMemory final : MemoryOfDevice {
  c10::DataPtr allocate(size_t size) override {
    void* data = allocate_bytes(size);
    return {data, data, &std::free, c10::Device(SECOND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &std::free;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
};
DeviceMemory device_memory;

// The CPU's memory that a GPU could read on its own. Here it is as any other; only its addresses are noted.
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* data = allocate_bytes(size);
    if (data) {
      std::lock_guard<std::mutex> lock(mutex());
      addresses().insert(data);
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, std::size_t size) const override {
    std::memcpy(to, from, size);
  }
  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    return addresses().count(data) > 0;
  }

 private:
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      addresses().erase(data);
    }
    std::free(data);
  }
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex();  // never destroyed, as tensors may outlive it
    return *mutex;
  }
  static std::unordered_set<const void*>& addresses() {
    static auto* addresses = new std::unordered_set<const void*>();
    return *addresses;
  }
};
PinnedMemory pinned_memory;

// ---- Random numbers -------------------------------------------------------------------------------------------------

struct DeviceGenerator final : at::CPUGeneratorImpl {
  DeviceGenerator() {
    device_ = c10::Device(SECOND, 0);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
    set_current_seed(c10::default_rng_seed_val);
  }
  void set_current_seed(uint64_t seed) override {
    at::CPUGeneratorImpl::set_current_seed(seed ^ OTHER);
  }
  uint64_t current_seed() const override {
    return at::CPUGeneratorImpl::current_seed() ^ OTHER;
  }

 private:
  static constexpr uint64_t OTHER = 0x5ec04d;  // other numbers than the CPU's from the same seed, as on a GPU
  DeviceGenerator* clone_impl() const override {
    auto* copy = new DeviceGenerator();
    copy->set_state(*get_state());
    return copy;
  }
};

const at::Generator& default_generator() {
  static auto* generator = new at::Generator(at::make_generator<DeviceGenerator>());
  return *generator;
}

// CPU kernels draw from CPU generators only. So the CPU's default one takes on the state of the device's for a while.
class LentGenerator {
 public:
  explicit LentGenerator(at::Generator device) : device_(std::move(device)) {
    give(device_, host_);
  }
  ~LentGenerator() {
    give(host_, device_);
    std::lock_guard<std::mutex> lock(host_.mutex());
    host_.set_state(before_);
  }

 private:
  static void give(at::Generator& from, at::Generator& to) {
    auto state = from.get_state();
    std::lock_guard<std::mutex> lock(to.mutex());
    to.set_state(state);
  }
  at::Generator device_;
  at::Generator host_ = at::detail::getDefaultCPUGenerator();
  Tensor before_ = host_.get_state();
};

// ---- What PyTorch asks of every device ------------------------------------------------------------------------------

// Streams: there is one, on which everything has been done when the host goes on.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;
  static constexpr c10::DeviceType static_type = SECOND;  // for C10_REGISTER_GUARD_IMPL

  c10::DeviceType type() const override {
    return SECOND;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return getDevice();
  }
  c10::Device getDevice() const override {
    return {SECOND, 0};
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override {
    return plugged ? 1 : 0;
  }
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream getNewStream(c10::Device, int) const override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream exchangeStream(c10::Stream) const override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    count_wait("synchronize");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    if (!plugged) {  // see Hooks::getPinnedMemoryAllocator
      return c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA)->synchronizeDevice(index);
    }
    count_wait("synchronize");
  }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) {
      *event = new Clock::time_point();
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {
    count_wait("synchronize");
  }
  double elapsedTime(void* start, void* end, const c10::DeviceIndex) const override {
    std::chrono::duration<double, std::milli> time =
        *static_cast<Clock::time_point*>(end) - *static_cast<Clock::time_point*>(start);
    return time.count();
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return plugged;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return plugged;
  }
  c10::DeviceIndex deviceCount() const override {
    return plugged ? 1 : 0;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::Device getDeviceFromPtr(void*) const override {
    return {SECOND, 0};
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    check_usable(c10::Device(SECOND, index));
    return at::make_generator<DeviceGenerator>();
  }
  // PyTorch asks a registered PrivateUse1 device first. Unplugged, it passes the question on to whom it would go otherwise.
  c10::Allocator* getPinnedMemoryAllocator() const override {
    return plugged ? &pinned_memory : at::globalContext().getPinnedMemoryAllocator(at::kCUDA);
  }
  bool isPinnedPtr(const void* data) const override {
    return PinnedMemory::holds(data) || (!plugged && at::globalContext().isPinnedPtr(data, at::kCUDA));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    auto data = device_memory.allocate(size);
    if (storage.data() && data) {
      std::memcpy(data.get(), storage.data(), std::min(storage.nbytes(), size));
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
  }
};
Hooks hooks;

// Autograd has a thread for every device, and counts the devices at its first backward pass in a process, which may have
// been before the device was plugged in.
struct Engine : torch::autograd::Engine {
  using torch::autograd::Engine::device_ready_queues_;
  using torch::autograd::Engine::start_device_threads;
};

void start_backward_thread() {
  auto& engine = torch::autograd::Engine::get_default_engine();
  engine.initialize_device_threads_pool();
  if ((engine.*&Engine::device_ready_queues_).empty()) {
    (engine.*&Engine::start_device_threads)();
  }
}

// ---- Tensors --------------------------------------------------------------------------------------------------------

bool on_device(const Tensor& tensor) {
  return tensor.device().type() == SECOND;
}

Tensor on_cpu(const Tensor& tensor) {  // the same memory as a CPU tensor, for this file only
  return at::from_blob(
      tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
}

Tensor empty(
    c10::IntArrayRef size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> format) {
  check_usable(device);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &device_memory, keys, at::dtype_or_default(dtype), format);
}

Tensor empty_strided(
    c10::IntArrayRef size,
    c10::IntArrayRef stride,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  check_usable(device);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, at::dtype_or_default(dtype));
}

// A Python number that is written to `x[...]`. On CUDA it stays on the CPU, for other devices PyTorch makes it a tensor
// there; the last one is remembered so that it can be told from a value that was computed on the device.
thread_local std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> last_number;

Tensor scalar_tensor(
    const at::Scalar& value,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin) {
  auto number = empty({}, dtype, layout, device, pin, std::nullopt);
  on_cpu(number).fill_(value);
  last_number = number.storage().getWeakStorageImpl();
  return number;
}

bool is_number(const Tensor& tensor) {
  if (!on_device(tensor)) {
    return tensor.numel() == 1;
  }
  return last_number && last_number->_unsafe_get_target() == tensor.storage().unsafeGetStorageImpl();
}

Tensor& set_storage_offset(Tensor& self, at::Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(s), offset, size, stride);
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  int64_t size = storage.nbytes() / self.dtype().itemsize();
  return set_storage_offset(self, std::move(storage), 0, size, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage_offset(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

// The host does not wait for a copy that a GPU makes on its own: asked for as such, and from or to pinned memory. What is
// neither contiguous nor laid out as on the device, CUDA copies by way of memory that is not pinned.
bool is_asynchronous(const Tensor& device, const Tensor& host, bool non_blocking) {
  bool alike = host.is_non_overlapping_and_dense() && host.strides() == device.strides() && host.dtype() == device.dtype();
  return non_blocking && (host.is_contiguous() || alike) && PinnedMemory::holds(host.storage().data());
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (to.numel() == 0) {
    return to;
  }
  if (!computing) {
    if (on_device(from) && on_device(to)) {
      if (is_number(from)) {  // x[...] = 1.0: CUDA has it on the CPU, copies it to a single element, and fills a slice
        to.dim() == 0 ? count_wait("copy of a number to the device") : count_operation("aten::fill_");
      }
    } else if (on_device(from) && !is_asynchronous(from, to, non_blocking)) {
      count_wait("copy from the device");
    } else if (on_device(to) && !is_asynchronous(to, from, non_blocking)) {
      count_wait("copy to the device");
    }
  }
  (on_device(to) ? on_cpu(to) : to).copy_(on_device(from) ? on_cpu(from) : from);
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) {
    to.resize_(from.sizes());
  }
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const Tensor& self) {
  count_wait("aten::_local_scalar_dense");
  return on_cpu(self).item();
}

// ---- Operations -----------------------------------------------------------------------------------------------------

// An operation and its arguments.
struct Call {
  const c10::OperatorHandle& op;
  Stack& stack;
  const c10::FunctionSchema& schema = op.schema();
  const std::vector<c10::Argument>& arguments = schema.arguments();

  IValue& value(size_t i) const {
    return stack[stack.size() - arguments.size() + i];
  }
  const IValue* value(const char* name) const {
    auto i = schema.argumentIndexWithName(name);
    return i ? &value(size_t(*i)) : nullptr;
  }
};

// Calls `see(tensor, argument, is_index)` for every tensor among the arguments.
template <typename See>
void for_each_tensor(const Call& call, const See& see) {
  auto look = [&](const Tensor& tensor, const c10::Argument& argument, bool is_index) {
    if (tensor.defined()) {
      see(tensor, argument, is_index);
    }
  };
  for (size_t i = 0; i < call.arguments.size(); i++) {
    const auto& argument = call.arguments[i];
    const auto& value = call.value(i);
    if (value.isTensor()) {
      look(value.toTensor(), argument, false);
    } else if (value.isTensorList()) {
      for (const Tensor& tensor : value.toTensorList()) {
        look(tensor, argument, false);
      }
    } else if (value.isOptionalTensorList()) {  // the indices of x[...]
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
        look(tensor.value_or(Tensor()), argument, true);
      }
    }
  }
}

// As on a GPU, there are two things that may be on the CPU: numbers, which are tensors of no dimensions that are only read,
// and the indices of x[...]. An index or a label that another operation takes is no number.
void check_same_device(const Call& call) {
  static const std::set<std::string> never{"index", "indices", "target"};
  for_each_tensor(call, [&](const Tensor& tensor, const c10::Argument& argument, bool is_index) {
    bool written = argument.alias_info() && argument.alias_info()->isWrite();
    bool number = tensor.dim() == 0 && !written && !never.count(argument.name());
    TORCH_CHECK(
        on_device(tensor) || number || is_index,
        "Expected all tensors to be on the same device, but found at least two devices, second:0 and ",
        tensor.device(), "! (when checking argument ", argument.name(), " of ", call.schema.name(), ")");
  });
}

// Whether `x[...] = value` waits: for the count of a mask, or to copy an index from the CPU. One mask and a number for
// value make a `masked_fill_`.
bool waits_for_index(const Call& call) {
  int masks = 0, others = 0, on_host = 0;
  for_each_tensor(call, [&](const Tensor& tensor, const c10::Argument&, bool is_index) {
    if (is_index) {
      bool is_mask = tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte;
      (is_mask ? masks : others)++;
      on_host += !on_device(tensor);
    }
  });
  bool number = is_number(call.value("values")->toTensor()) && !call.value("accumulate")->toBool();
  bool fill = number && masks == 1 && others == 0;
  return on_host > 0 || (masks > 0 && !fill);
}

// Whether the host waits for a result or its size in CUDA's implementation of an operation.
bool waits_for_device(const Call& call) {
  static const std::set<std::string> fills{"masked_fill", "masked_fill_", "index_fill", "index_fill_"};  // by a number
  static const std::set<std::string> checks{"_linalg_eigh", "_linalg_svd", "linalg_eig"};  // whether it converged
  auto name = call.schema.name().substr(call.schema.name().find("::") + 2);
  if (name == "index") {
    return false;  // before it comes here, PyTorch has copied its indices and counted its masks on the device
  }
  if (name == "_index_put_impl_") {
    return waits_for_index(call);
  }
  if (name == "repeat_interleave") {
    return call.value("output_size")->isNone();
  }
  if (fills.count(name)) {
    auto* value = call.value("value");
    return value && value->isTensor() && on_device(value->toTensor());
  }
  if (name == "normal") {  // whether every deviation is positive
    auto* deviation = call.value("std");
    return deviation && deviation->isTensor();
  }
  return checks.count(name) || call.op.hasTag(at::Tag::dynamic_output_shape) ||
      call.op.hasTag(at::Tag::data_dependent_output);
}

// The generator that an operation draws from, taken from its arguments; none for one that draws nothing.
std::optional<at::Generator> take_generator(const Call& call) {
  bool draws = call.op.hasTag(at::Tag::nondeterministic_seeded);
  std::optional<at::Generator> given;
  for (size_t i = 0; i < call.arguments.size(); i++) {
    if (call.value(i).isGenerator()) {
      given = call.value(i).toGenerator();
      call.value(i) = IValue();
    }
  }
  TORCH_CHECK(
      !given || given->device().type() == SECOND,
      "Expected a 'second' device type for generator but found '", given->device(), "'");
  return given ? given : draws ? std::optional(default_generator()) : std::nullopt;
}

void run(const c10::OperatorHandle& op, Stack* stack) {
  Call call{op, *stack};
  check_usable();
  check_same_device(call);
  count_operation(op.schema().name());
  if (waits_for_device(call)) {
    count_wait(op.schema().name());
  }
  Computing now;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // of the CPU, within its kernels
  std::optional<LentGenerator> lent;
  if (auto generator = take_generator(call)) {
    lent.emplace(*generator);
  }
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

void run_as(const char* name, Stack* stack) {
  run(c10::Dispatcher::singleton().findSchemaOrThrow(name, ""), stack);
}

// Convolutions have a name of their own for devices of other kinds, and no kernel by that on the CPU.
void convolution(const c10::OperatorHandle&, Stack* stack) {
  run_as("aten::convolution", stack);
}

void convolution_backward(const c10::OperatorHandle& op, Stack* stack) {
  Call call{op, *stack};
  auto weight = call.value("weight")->toTensor();
  bool transposed = call.value("transposed")->toBool();
  int64_t channels = transposed ? weight.size(1) * call.value("groups")->toInt() : weight.size(0);
  auto bias_sizes = call.schema.argumentIndexWithName("weight").value() + 1;  // the only argument that is missing
  stack->insert(stack->end() - int64_t(call.arguments.size()) + bias_sizes, IValue(std::vector<int64_t>{channels}));
  run_as("aten::convolution_backward", stack);
}

// It writes the running mean and variance, but does not say so. The one of the same arguments that says so needs them.
void batch_norm(const c10::OperatorHandle& op, Stack* stack) {
  bool running = Call{op, *stack}.value("running_mean")->isTensor();
  running ? run_as("aten::_native_batch_norm_legit", stack) : run(op, stack);
}

} // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory)

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("scalar_tensor", &scalar_tensor);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("resize_", &resize);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  // PyTorch's own formula for any device takes no channels-last tensors, which the CPU's and CUDA's kernels do.
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&run>());
  m.impl("native_batch_norm", torch::CppFunction::makeFromBoxedFunction<&batch_norm>());
  // Views share memory, which the CPU's kernels could not do from copies.
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // the same lists as CUDA's
  using namespace at;  // which PyTorch's macros expect
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT_RESULT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FLOAT)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT_RESULT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("plug", [](bool in) {
    pid_t nobody = 0;
    if (in && owner.compare_exchange_strong(nobody, getpid())) {
      plugged = true;
      py::gil_scoped_release no_gil;  // which the new thread takes to start
      start_backward_thread();
    }
    plugged = in;
  });
  m.def("is_plugged", [] { return plugged.load(); });
  m.def("is_forked", [] { return owner != 0 && owner != getpid(); });
  m.def("waits", [] { return waits.load(); });
  m.def("operations", [] { return operations.load(); });
  m.def("log_to", [](py::object callback) {
    logging = !callback.is_none();
    logger() = logging ? std::move(callback) : py::object();
  });
  m.def("default_generator", [] { return default_generator(); });
}
