// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "decode/search/calls.hpp"

namespace hotloop::decode {

void backtrack(const BacktrackCall& call) {
  for (std::int64_t b = 0; b < call.batch; ++b) {
    std::int64_t local = call.before.local_attempts[b], total = call.before.total_attempts[b];
    bool correcting = call.before.correcting[b] != 0, done = call.before.done[b] != 0;
    double temperature = correcting ? call.before.temperatures[b] : call.temperature;
    std::int64_t action = kNone, kept = call.prefix_lengths[b], flagged = -1;
    if (!done) {
      ++total;
      const double* p = call.p_unconfident + b * call.phrases;
      const std::int64_t* ends = call.span_ends + b * call.phrases;
      // While a phrase is being corrected, only that phrase is looked at.
      const std::int64_t considered = correcting ? std::min<std::int64_t>(call.phrases, 1) : call.phrases;
      for (std::int64_t i = 0; i < considered && ends[i] >= 0 && flagged < 0; ++i) {
        if (p[i] > call.tau) flagged = i;
      }
      if (flagged < 0 && !correcting) {
        action = kAccept;
        kept += call.chunk_lengths[b];
        done = true;
      } else if (flagged < 0) {
        action = kContinue;
        kept += call.phrases > 0 && ends[0] >= 0 ? ends[0] + 1 : call.chunk_lengths[b];
        correcting = false;
        local = 0;
        temperature = call.temperature;
      } else {
        correcting = true;
        temperature = std::min(temperature + call.temperature_step, call.temperature + call.temperature_rise);
        if (++local >= call.max_local_attempts) {
          action = kCut;
          kept = call.sentence_lengths[b];
          local = 0;
        } else {
          action = kResample;
          kept += flagged == 0 ? 0 : ends[flagged - 1] + 1;
        }
      }
      if (action != kAccept && total >= call.max_total_attempts) {
        action = kStop;
        done = true;
      }
    }
    call.after.local_attempts[b] = local;
    call.after.total_attempts[b] = total;
    call.after.temperatures[b] = temperature;
    call.after.correcting[b] = correcting ? 1 : 0;
    call.after.done[b] = done ? 1 : 0;
    call.actions[b] = action;
    call.kept_lengths[b] = kept;
    call.flagged[b] = flagged;
  }
}

}  // namespace hotloop::decode
