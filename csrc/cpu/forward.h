// Forward: one work item is a tile of rows of one key/value head, with a pack of its query heads.
#pragma once

#include "arguments.h"
#include "exp2.h"
#include "gemm.h"
#include "rows.h"
#include "shield.h"
#include "strips.h"
#include "transpose.h"

GISTKERN_NAMESPACE_BEGIN

constexpr int64_t kTileStrips = 64 / kStrip > 0 ? 64 / kStrip : 1;
constexpr int64_t kTileRows = kTileStrips * kStrip;
static_assert(kTileRows == kChunkRows, "chunks of the backward begin at tiles");
// keys and values of a block stay in the second-level cache, their scores in the first
constexpr int64_t kBlockKeys = 126;
constexpr int64_t kMaximumPack = 8;

// Query heads of one key/value head that share a work item, and so each block of keys and values.
inline int64_t pack_heads(int64_t group) {
  int64_t pack = smaller(group, kMaximumPack);
  while (group % pack) --pack;
  return pack;
}

// Running softmax of the rows of one strip, and their output: [dim][kStrip], not yet divided by the sum.
struct Running {
  Floats maximum[kStripVectors], sum[kStripVectors];
  float* out;
};

// Adds keys [begin, end) of one buffer. `key` and `value` start at row `begin`.
inline void attend(const Intervals& intervals, int64_t begin, int64_t end, Block key, Block value, const float* query,
                   int64_t dim, float log2_scale, float* scores, float* shielded, Running& running) {
  const int64_t count = end - begin;
  gemm<Layout::kRows, Update::kReplace>(count, key.data, key.stride, query, kStrip, dim, scores, kStrip);
  mask_scores(intervals, begin, end, scores, kStrip);
  Floats rescale[kStripVectors];
  for (int v = 0; v < kStripVectors; ++v) {
    Floats largest = running.maximum[v];
    for (int64_t i = 0; i < count; ++i) largest = maximum(load(scores + i * kStrip + v * kLanes), largest);
    // a row that has seen nothing so far: -inf - -inf would be NaN
    const Floats base = select(largest == -__builtin_inff(), broadcast(0.0f), largest);
    Floats total = {};
    for (int64_t i = 0; i < count; ++i) {
      float* score = scores + i * kStrip + v * kLanes;
      // subtracted before it is scaled, as the plain computation does
      const Floats probability = exp2((load(score) - base) * log2_scale);
      total += probability;
      store(score, probability);
    }
    rescale[v] = exp2((running.maximum[v] - base) * log2_scale);
    running.sum[v] = running.sum[v] * rescale[v] + total;
    running.maximum[v] = largest;
  }
  bool poisoned = false;
  for_poisoned_keys(intervals, begin, end, value, dim, [&](int64_t) { poisoned = true; });
  const Block safe = poisoned ? without_poison(intervals, begin, end, value, dim, shielded) : value;
  gemm<Layout::kColumns, Update::kScale>(dim, safe.data, safe.stride, scores, kStrip, count, running.out, kStrip,
                                         rescale);
  if (poisoned) add_poison(intervals, begin, end, value, dim, scores, running.out);
}

struct ForwardScratch {
  float *query, *out, *scores, *rows, *shielded;
};

inline int64_t forward_scratch_floats(const AttentionArguments& x) {
  const int64_t width = round_up(x.head_dim, kLanes);
  const int64_t strips = pack_heads(x.group()) * kTileStrips;
  return 2 * strips * width * kStrip + kBlockKeys * kStrip + kStrip * width + kBlockKeys * x.head_dim;
}

inline int64_t forward_items(const AttentionArguments& x) {
  return (x.rows + kTileRows - 1) / kTileRows * x.batch * (x.query_heads / pack_heads(x.group()));
}

// A strip of typed rows of one head as [width][kStrip]; lanes beyond the last row and columns beyond head_dim are 0.
inline void read_transposed(const Rows& rows, int64_t sample, int64_t head, int64_t first, int64_t end, int64_t dim,
                            float* scratch, float* to) {
  const int64_t width = round_up(dim, kLanes);
  for (int64_t i = 0; i < kStrip; ++i) {
    float* row = scratch + i * width;
    const int64_t used = first + i < end ? dim : 0;
    if (used) read_row(rows, sample, head, first + i, dim, row);
    std::memset(row + used, 0, (width - used) * sizeof(float));
  }
  rows_to_strip(scratch, width, width, to);
}

// The output and log-sum-exp of one strip of one head.
inline void write_strip(const AttentionArguments& x, const Strip& strip, const Running& running, int64_t sample,
                        int64_t head, int64_t row, float* rows) {
  const int64_t width = round_up(x.head_dim, kLanes);
  float sums[kStrip], maxima[kStrip];
  for (int v = 0; v < kStripVectors; ++v) {
    store(sums + v * kLanes, running.sum[v]);
    store(maxima + v * kLanes, running.maximum[v]);
  }
  strip_to_rows(running.out, width, rows, width);
  const int64_t first = (sample * x.query_heads + head) * x.rows + row;
  char* out = static_cast<char*>(x.out) + first * x.head_dim * element_bytes(x.query.type);
  for (int64_t i = 0; i < smaller(kStrip, x.rows - row); ++i) {
    float* one = rows + i * width;
    float factor = 1.0f / sums[i];
    if (strip.empty[i]) {
      std::memset(one, 0, x.head_dim * sizeof(float));
      factor = 1.0f;
    }
    narrow(one, factor, x.query.type, x.head_dim, out + i * x.head_dim * element_bytes(x.query.type));
    const volatile float top = maxima[i] * x.scale;  // rounded, as the backward rounds scores
    x.lse[first + i] = strip.empty[i] ? -__builtin_inff() : top + __builtin_logf(sums[i]);
  }
}

inline void forward_item(const AttentionArguments& x, int64_t item, float* memory) {
  const int64_t dim = x.head_dim, width = round_up(dim, kLanes), pack = pack_heads(x.group());
  const int64_t tiles = (x.rows + kTileRows - 1) / kTileRows, packs = x.query_heads / pack;
  // tiles of one head follow each other and find its keys and values in the cache; later rows see more and go first
  const int64_t tile = tiles - 1 - item % tiles, sample = item / tiles / packs;
  const int64_t first_head = item / tiles % packs * pack, kv_head = first_head / x.group();
  const int64_t first = tile * kTileRows, strips = (smaller(x.rows, first + kTileRows) - first + kStrip - 1) / kStrip;

  ForwardScratch scratch;
  scratch.query = memory;
  scratch.out = scratch.query + pack * kTileStrips * width * kStrip;
  scratch.scores = scratch.out + pack * kTileStrips * width * kStrip;
  scratch.rows = scratch.scores + kBlockKeys * kStrip;
  scratch.shielded = scratch.rows + kStrip * width;

  Strip strip[kTileStrips];
  Running running[kTileStrips * kMaximumPack];
  for (int64_t s = 0; s < strips; ++s) read_strip(x, sample, first + s * kStrip, strip[s]);
  for (int64_t g = 0; g < pack; ++g) {
    for (int64_t s = 0; s < strips; ++s) {
      const int64_t at = g * kTileStrips + s;
      read_transposed(x.query, sample, first_head + g, first + s * kStrip, x.rows, dim, scratch.rows,
                      scratch.query + at * width * kStrip);
      running[at].out = scratch.out + at * width * kStrip;
      std::memset(running[at].out, 0, width * kStrip * sizeof(float));
      for (int v = 0; v < kStripVectors; ++v) {
        running[at].maximum[v] = broadcast(-__builtin_inff());
        running[at].sum[v] = broadcast(0.0f);
      }
    }
  }
  const float log2_scale = x.scale * kLog2E;
  for (const bool local : {false, true}) {
    const Rows& keys = local ? x.key : x.gist_key;
    const Rows& values = local ? x.value : x.gist_value;
    int64_t hull_begin = INT64_MAX, hull_end = 0;
    for (int64_t s = 0; s < strips; ++s) widen_hull(local ? strip[s].local : strip[s].gist, hull_begin, hull_end);
    for (int64_t begin = hull_begin; begin < hull_end; begin += kBlockKeys) {
      const int64_t count = smaller(kBlockKeys, hull_end - begin);
      for (int64_t s = 0; s < strips; ++s) {
        const Intervals& intervals = local ? strip[s].local : strip[s].gist;
        const int64_t from = larger(begin, intervals.hull_begin), to = smaller(begin + count, intervals.hull_end);
        if (from >= to) continue;
        const Block key = block_at(keys, sample, kv_head, from), value = block_at(values, sample, kv_head, from);
        for (int64_t g = 0; g < pack; ++g) {
          const int64_t at = g * kTileStrips + s;
          attend(intervals, from, to, key, value, scratch.query + at * width * kStrip, dim, log2_scale, scratch.scores,
                 scratch.shielded, running[at]);
        }
      }
    }
  }
  for (int64_t g = 0; g < pack; ++g) {
    for (int64_t s = 0; s < strips; ++s) {
      write_strip(x, strip[s], running[g * kTileStrips + s], sample, first_head + g, first + s * kStrip, scratch.rows);
    }
  }
}

GISTKERN_NAMESPACE_END
