// What CuTe (NVIDIA CUTLASS) says about the fragments of mma.m16n8k16 and ldmatrix.x4, as JSON: for every layout a list
// per lane of where its values come from. For tests/csrc/test_fragments.py; needs CUTLASS's headers, no GPU.
#include <cstdio>
#include <cute/layout.hpp>
// the traits need the layouts first
#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>

namespace {

template <typename Layout>
void print_layout(const char* name, Layout layout, const char* separator) {
  std::printf("\"%s\": [", name);
  const int lanes = cute::size<0>(layout), values = cute::size<1>(layout);
  for (int lane = 0; lane < lanes; ++lane) {
    std::printf(lane == 0 ? "[" : "], [");
    for (int value = 0; value < values; ++value) std::printf(value == 0 ? "%d" : ", %d", int(layout(lane, value)));
  }
  std::printf("]]%s", separator);
}

template <typename Operation>
void print_mma(const char* name) {
  using Traits = cute::MMA_Traits<Operation>;
  std::printf("\"%s\": {", name);
  print_layout("a", typename Traits::ALayout{}, ", ");
  print_layout("b", typename Traits::BLayout{}, ", ");
  print_layout("c", typename Traits::CLayout{}, "}, ");
}

template <typename Operation>
void print_copy(const char* name, const char* separator) {
  using Traits = cute::Copy_Traits<Operation>;
  std::printf("\"%s\": {", name);
  print_layout("source", typename Traits::SrcLayout{}, ", ");
  print_layout("destination", typename Traits::DstLayout{}, "}");
  std::printf("%s", separator);
}

}  // namespace

int main() {
  std::printf("{");
  print_mma<cute::SM80_16x8x16_F32F16F16F32_TN>("float16");
  print_mma<cute::SM80_16x8x16_F32BF16BF16F32_TN>("bfloat16");
  print_copy<cute::SM75_U32x4_LDSM_N>("ldmatrix", ", ");
  print_copy<cute::SM75_U16x8_LDSM_T>("ldmatrix_trans", "}\n");
}
