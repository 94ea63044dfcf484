/*
 * A tile is up to kTile positions that are handled together. These are the arrays of its loops, with one
 * number per position each.
 */
#pragma once

#include "exp_log.h"

namespace {

const int kTile = 512;
const int kGroup = 4;   // classes that are added up before anything else is
const int kLanes = 64;  // parts in which the sum over a row runs

const int kInvalid = -1, kIgnored = -2;  // in the place of a class

// What terms_of_tile reads and writes; operator.cc says what the names mean
template <typename T> struct Terms {
  const double *log_reference, *sum, *z_label, *top, *gaps;
  const T *w_label;
  double total_weight, classes;
  T fill_invalid, fill_ignored;
  T *nll, *logsumexp, *uniform_nll;          // null for what is not asked for
  T *kept_nll, *kept_logsumexp, *kept_rest;  // not weighted, not filled in
};

// What gradient_of_tile reads: the gradients that come in, and what terms_of_tile wrote
template <typename T> struct Incoming {
  const T *g_nll, *g_logsumexp, *g_uniform_nll;
  const T *nll, *logsumexp, *rest, *w_label;
  double total_weight, classes;
};

// The gradient of a logit is q exp(z - reference) - u w, and `at_label` for the label's.
template <typename T> struct Gradient {
  T shift[kTile];
  Int<T> k[kTile];
  T q[kTile], u[kTile], at_label[kTile];
};

}  // namespace
