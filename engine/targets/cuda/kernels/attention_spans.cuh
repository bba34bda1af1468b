// Where packed sequences lie, whatever their starts say. `Sequences` comes from attention_operands.py.
#pragma once
#include "types.cuh"

// Where a sequence lies. Starts that fall, or lie outside, never lead beyond the tokens. The one behind the last is what is left.
struct Span { u32 begin, rows, keys; };
DEVICE Span span_between(const Params& p, u32 start, u32 next) {
  const u32 begin = min(start, p.queries), end = max(begin, min(next, p.queries));
  return {begin, end - begin, end - begin};
}
DEVICE Span span_of(const Params& p, u32 sequence) {
  const bool behind = sequence == Sequences::count(p);
  const u32 start = Sequences::start(p, sequence), next = Sequences::start(p, behind ? sequence : sequence + 1);
  Span span = span_between(p, start, behind ? p.queries : next);
  if (behind) span.keys = 0;
  return span;
}
