/*
 * A tile is up to kTile positions that are handled together. These are the arrays of its loops, with one
 * number per position each; operator.cc says what the names mean.
 */
#pragma once

#include "exp_log.h"

namespace {

const int kTile = 512;
const int kGroup = 4;   // classes that are added up before anything else is
const int kLanes = 64;  // parts in which the sum over a row runs

const int kInvalid = -1, kIgnored = -2;  // in the place of a class

template <typename T> struct Tile {
  int64_t begin;           // the first position
  int n;                   // how many
  int64_t j_begin, j_end;  // classes
  int64_t at[kTile];       // where in `pred` the position's class 0 is
  Int<T> y[kTile];
  T w_label[kTile];
};

// Over some of the classes
struct Sums {
  double log_reference[kTile], sum[kTile];
  double top[kTile], gaps[kTile], weight;  // sum_j w_j (top - z_j), and sum_j w_j
  double z_label[kTile];
};

// The terms, or the gradients that come in; null for what is not asked for
template <typename T> struct Terms {
  T *nll, *logsumexp, *uniform_nll;
};

// What forward leaves to backward, neither weighted nor filled in
template <typename T> struct Kept {
  T *nll, *logsumexp, *rest;
};

// The same for all positions
template <typename T> struct Constants {
  double total_weight, classes;
  T fill_invalid, fill_ignored;
};

// The gradient of a logit is q exp(z - reference) - u w, and `at_label` for the label's.
template <typename T> struct Gradient {
  T shift[kTile];
  Int<T> k[kTile];
  T q[kTile], u[kTile], at_label[kTile];
};

}  // namespace
