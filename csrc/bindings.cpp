// Op schemas and build facts; the kernels register themselves in csrc/<device>/<op>*.cpp.
//
// A SparsityPattern reaches an op as five int32 tensors over the grid of blocks [rows, columns]
// (uasparse_kernels/pattern.py): crow [rows + 1] and col [blocks] list the active blocks by rows; ccol [columns + 1],
// row [blocks] and perm [blocks] list them by columns, perm giving each one's place in the order by rows, which is the
// order of packed values. `shape` is the weight's shape, `block` the block's. A weight of `shape` is dense-stored
// (inactive entries are zero), any other is packed: [nnz] for 1x1 blocks, else [blocks, block_rows, block_columns].

#include <Python.h>  // first, as it asks
#include <torch/library.h>

#include <exception>

#include "cpu/isa.h"

#ifndef UASPARSE_CUDA_ARCHS
#define UASPARSE_CUDA_ARCHS ""
#endif

// A program without Python loads this file for its ops (examples/serve_cpp): what Python gives may be missing.
#pragma weak PyErr_SetString
#pragma weak PyExc_RuntimeError
#pragma weak PyModule_AddStringConstant
#pragma weak PyModule_Create2
#pragma weak PyUnicode_FromString
#pragma weak _Py_Dealloc

#define PATTERN "Tensor crow, Tensor col, Tensor ccol, Tensor row, Tensor perm, int[] shape, int[] block"
#define CONVOLUTION "int[] stride, int[] padding, int[] dilation, int groups"

TORCH_LIBRARY(uasparse, m) {
  // Values between storages: pack reads the active entries of a dense tensor, unpack writes them into zeros.
  m.def("pack(Tensor dense, Tensor crow, Tensor col, int[] block) -> Tensor");
  m.def("unpack(Tensor values, Tensor crow, Tensor col, int[] shape, int[] block) -> Tensor");
  // Zeroes the inactive entries of a dense gradient.
  m.def("keep_active_(Tensor(a!) dense, Tensor crow, Tensor col, int[] block) -> ()");
  // The same by a mask (bool, of the tensor's shape), and whether there is nothing to do: of `sampled` entries, or of all.
  // CPU only.
  m.def("mask_(Tensor(a!) dense, Tensor mask) -> ()");
  m.def("is_masked(Tensor dense, Tensor mask, bool sampled) -> bool");

  // Gradients that output_mask (input, weight, bias) does not ask for come back as empty tensors.
  m.def("masked_linear(Tensor input, Tensor weight, Tensor? bias, " PATTERN ") -> Tensor");
  m.def("masked_linear_backward(Tensor grad_output, Tensor input, Tensor weight, " PATTERN
        ", bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  // Its products with unstructured weights on a GPU. The weight is given by rows (offsets, index, values [nnz]), or the
  // transpose of it: x [tokens, columns] @ W^T + bias into out [tokens, rows]; dy^T x at the active entries [nnz].
  m.def("sparse_product_out(Tensor x, Tensor values, Tensor? bias, Tensor offsets, Tensor index, Tensor(a!) out) -> ()");
  m.def("sparse_sampled_product(Tensor dy, Tensor x, Tensor offsets, Tensor index) -> Tensor");
  m.def("masked_conv2d(Tensor input, Tensor weight, Tensor? bias, " PATTERN ", " CONVOLUTION ") -> Tensor");
  m.def("masked_conv2d_backward(Tensor grad_output, Tensor input, Tensor weight, " PATTERN ", " CONVOLUTION
        ", bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // Indices (int64, ascending) of the k largest or smallest of scores [n], or of their absolute values; of equal scores
  // the lower index wins, and NaN comes after every number.
  m.def("topk_indices(Tensor scores, int k, bool largest, bool magnitude=False) -> Tensor");
  // The same for many layers at once: k[i] of scores[i].
  m.def("topk_indices_many(Tensor[] scores, int[] k, bool largest, bool magnitude=False) -> Tensor[]");
  // Indices (int64, ascending) of scores above a threshold. CPU only: on a GPU the host would wait for their number.
  m.def("indices_above(Tensor scores, float threshold) -> Tensor");
  // scores [n] of the blocks from flat index `first` on: those of active blocks that are not in `dropped` become NaN.
  m.def("exclude_kept_(Tensor(a!) scores, int first, Tensor crow, Tensor col, Tensor dropped, int columns) -> ()");
  // Of unstructured patterns, on the CPU: indices (int64, ascending) of the k largest magnitudes of `dense` in all places
  // that are inactive or in `dropped`; NaN comes last.
  m.def("growth_indices(Tensor dense, int k, Tensor crow, Tensor col, Tensor dropped) -> Tensor");
  // Flat grid indices of the blocks at `places` (int64, ascending) of the order by rows. On the CPU.
  m.def("blocks_at(Tensor crow, Tensor col, Tensor places, int columns) -> Tensor");
  // The sum of hashes of the active blocks, as SparsityPattern's signature takes it: int64 []. On the CPU.
  m.def("pattern_hash(Tensor crow, Tensor col, int seed) -> Tensor");
  // Replaces the blocks `dropped` by the blocks `grown` (int64, ascending, flat indices into the grid of blocks; the
  // two may overlap: such blocks stay) in the pattern, the weight and each of the states; what was inactive becomes zero.
  m.def("prune_grow_(Tensor(a!) weight, Tensor(b!)[] states, Tensor(c!) crow, Tensor(d!) col, Tensor(e!) ccol, "
        "Tensor(f!) row, Tensor(g!) perm, Tensor dropped, Tensor grown, int[] shape, int[] block) -> ()");

  // Over batch and pixels of input [N, C, ...]. -> output; stats [2, C]: mean and unbiased variance; saved [3, C]: mean,
  // 1 / sqrt(variance + eps) and bias in float64 for the backward, whose unwanted gradients come back empty.
  m.def("batch_norm(Tensor input, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool[3] output_mask) "
        "-> (Tensor, Tensor, Tensor)");

  // relu(batch_norm(input) + residual). The backward tells from `output` where a gradient passes, or, without a residual,
  // from input, weight and what was saved. ceiling: of a ReLU that has one, which needs `output`.
  m.def("batch_norm_relu(Tensor input, Tensor? weight, Tensor? bias, Tensor? residual, float eps) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? output, Tensor saved, "
        "bool[4] output_mask, float? ceiling=None) -> (Tensor, Tensor, Tensor, Tensor)");
  // Both backwards, with a ReLU or without, into grad_output: the residual's gradient where it is asked for, else the
  // input's. -> gradients of the input (empty where it is there), the weight and the bias.
  m.def("batch_norm_backward_(Tensor(a!) grad_output, Tensor input, Tensor? weight, Tensor? output, Tensor saved, bool relu, "
        "bool[4] output_mask, float? ceiling=None) -> (Tensor, Tensor, Tensor)");
  // torch.relu_, or with a ceiling hardtanh_ from zero to it. After a batch_norm, or the addition of a residual to one, its gradient is taken in that one's backward.
  m.def("relu_(Tensor(a!) input, float? ceiling=None) -> Tensor(a!)");

  // -> output, indices into each plane, as torch's max_pool2d_with_indices.
  m.def("max_pool2d(Tensor input, int[2] kernel, int[2] stride, int[2] padding) -> (Tensor, Tensor)");

  // The output, in whose backward capture_ (uasparse_kernels/topology/growth.py) is called with input and gradient. It
  // claims to write to `mark`, which names the GradientCapture, for a compiler leaves out what has no effect.
  m.def("watch(Tensor(a) output, Tensor input, Tensor mark) -> Tensor(a)");
  m.def("capture_(Tensor(a!) mark, Tensor input, Tensor grad_output) -> ()");

  // reduction: 0 none, 1 mean, 2 sum. -> loss, threshold [], saved [N, 2] for the backward.
  m.def("unknown_aware_loss(Tensor logits, Tensor target, Tensor alpha, float unknown_weight, int reduction) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("unknown_aware_loss_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor alpha, Tensor saved, "
        "float unknown_weight, int reduction) -> Tensor");
  // On a GPU, for reductions 1 and 2: the gradient of the logits too, made for the gradient of the loss that is likely;
  // saved [N, 3] tells which. The second puts it right, once grad_loss is known.
  m.def("unknown_aware_loss_at_once(Tensor logits, Tensor target, Tensor alpha, float unknown_weight, int reduction) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("unknown_aware_loss_put_right_(Tensor(a!) grad, Tensor grad_loss, Tensor logits, Tensor target, Tensor alpha, "
        "Tensor saved, float unknown_weight, int reduction) -> ()");

  // Runs a plan of uasparse_kernels/inference (csrc/cpu/serve.cpp): steps over an arena of feature maps.
  m.def("serve_run(Tensor(a!) arena, Tensor program, Tensor ints, Tensor values, Tensor[] inputs, "
        "Tensor(b!)[] outputs) -> ()");
}

namespace {

PyObject* cpu_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(uasparse::isa_name(uasparse::cpu_isa()));
  } catch (const std::exception& error) {  // UASPARSE_CPU_ISA names none, or one that this processor lacks
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "Instruction set of the CPU kernels: portable, avx2 or avx512."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled kernels of uasparse_kernels; importing it registers the ops of torch.ops.uasparse.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

#define INIT_OF(name) PyInit_##name
#define INIT(name) INIT_OF(name)

// Only what Python's stable ABI has: one build serves every Python from 3.11 on. The name says for which torch
// (uasparse_kernels/_compiled.py).
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  PyObject* m = PyModule_Create(&module);
  if (m == nullptr) return nullptr;
  if (PyModule_AddStringConstant(m, "torch_version", UASPARSE_TORCH_VERSION) < 0 ||
      PyModule_AddStringConstant(m, "compiler", __VERSION__) < 0 ||
      PyModule_AddStringConstant(m, "cuda_archs", UASPARSE_CUDA_ARCHS) < 0) {
    Py_DECREF(m);
    return nullptr;
  }
  return m;
}
