// Products with weights, which come in float32 or in bf16.
#pragma once

#include "lanes.h"
#include "products.h"

namespace kvsplice {

// A tensor of float32 or bf16 numbers.
struct Numbers {
  const void* data;
  int64_t is_bfloat16;
};

// Numbers read one at a time, whatever their type.
inline float number_of(const float* from) { return *from; }
inline float number_of(const Bfloat16* from) { return number_of(*from); }

template <class Run>
inline void with_type(const Numbers& numbers, Run&& run) {
  if (numbers.is_bfloat16) {
    run(static_cast<const Bfloat16*>(numbers.data));
  } else {
    run(static_cast<const float*>(numbers.data));
  }
}

inline float number_at(const Numbers& numbers, int64_t index) {
  float number;
  with_type(numbers, [&](const auto* data) { number = number_of(data + index); });
  return number;
}

// Sums of weighted rows, for columns from `first` up to `last`: [count, stride] rows, [queries, weights_stride]
// weights. Whole vectors of sums are written.
template <class Number>
void mix(const Number* rows, int64_t stride, int64_t count, const float* weights, int64_t weights_stride,
         int64_t queries, int64_t first, int64_t last, float* sums, int64_t sums_stride) {
  const int64_t whole = (last - first) / kLanes, vectors_in_all = blocks_of(last - first, kLanes);
  for (int64_t query = 0; query < queries; ++query) {
    std::memset(sums + query * sums_stride + first, 0, vectors_in_all * kLanes * sizeof(float));
  }
  int64_t done = 0;
  for (; queries == 1 && done + kStretch <= whole; done += kStretch) {
    const int64_t column = first + done * kLanes;
    mix_rows_once(rows + column, stride, count, weights, sums + column);
  }
  Ahead none;
  in_groups<kMixedTogether>(queries, [&]<int together>(int64_t query) {
    in_groups<4>(vectors_in_all - done, [&]<int vectors>(int64_t vector) {
      const int64_t column = first + (done + vector) * kLanes, behind = last - column - (vectors - 1) * kLanes;
      mix_rows<Number, together, vectors>(rows + column, stride, count, behind, weights + query * weights_stride,
                                          weights_stride, sums + query * sums_stride + column, sums_stride, none);
    });
  });
}

// Products of the rows from `first` up to `last` with queries, given to `take(query, row, product)`. Queries are filled
// up with 0 to whole vectors.
template <class Number, class Take>
void dot(const Number* rows, int64_t stride, int64_t first, int64_t last, int64_t width, const float* query,
         int64_t query_stride, int64_t queries, Take&& take) {
  const auto at = [&](int64_t row) { return rows + smaller(row, last - 1) * stride; };
  for (int64_t row = first; queries == 1 && row < last; row += kLanes) {
    const Number* some[kLanes];
    for (int index = 0; index < kLanes; ++index) some[index] = at(row + index);
    const Floats products = dot_rows_once(some, width, query);
    for (int64_t present = row; present < smaller(row + kLanes, last); ++present)
      take(0, present, products[present - row]);
  }
  Ahead none;
  for (int64_t row = first; queries > 1 && row < last; row += kDotRows) {
    const Number* some[kDotRows];
    for (int index = 0; index < kDotRows; ++index) some[index] = at(row + index);
    in_groups<kDotQueries>(queries, [&]<int together>(int64_t start) {
      float products[kDotQueries * kDotRows];
      dot_rows<InFloats<Number>, together>(some, width, query + start * query_stride, query_stride, products, kDotRows,
                                           none);
      for (int index = 0; index < together; ++index) {
        for (int64_t present = row; present < smaller(row + kDotRows, last); ++present) {
          take(start + index, present, products[index * kDotRows + present - row]);
        }
      }
    });
  }
}

// What one thread takes at a time: columns and codes of a sum of weighted rows, and rows that are multiplied.
constexpr int kColumnsAtOnce = kStretch * kLanes, kCodesAtOnce = 2 * kLanes, kRowsAtOnce = 32;

}  // namespace kvsplice
