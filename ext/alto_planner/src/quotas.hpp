// What each tenant holds against its quota, and what its cohort has left to lend.
#pragma once

#include <vector>

#include "model.hpp"

namespace alto {

class Quotas {
  public:
    Quotas(const Problem& problem, bool ignored)
        : problem_(problem),
          on_(problem.has_quotas && !ignored),
          held_(problem.tenants.size(), 0),
          cohort_held_(problem.tenants.size() + 1, 0),
          cohort_quota_(problem.tenants.size() + 1, 0) {
        for (const Tenant& tenant : problem.tenants)
            if (tenant.cohort >= 0) cohort_quota_[tenant.cohort] += tenant.quota_gpus;
    }

    [[nodiscard]] bool on() const { return on_; }
    [[nodiscard]] bool limits(int tenant) const { return on_ && problem_.tenants[tenant].quota_gpus < kNever; }

    [[nodiscard]] bool allow(int tenant, int gpus) const {
        const Tenant& row = problem_.tenants[tenant];
        const double used = held_[tenant] + gpus;
        if (used <= row.quota_gpus) return true;
        if (row.cohort < 0 || used > row.quota_gpus + row.borrow_gpus) return false;
        return cohort_held_[row.cohort] + gpus <= cohort_quota_[row.cohort];
    }
    [[nodiscard]] bool borrows(int tenant, int gpus) const {
        return held_[tenant] + gpus > problem_.tenants[tenant].quota_gpus;
    }

    // `gpus` more, or, when negative, fewer.
    void take(int tenant, int gpus) {
        held_[tenant] += gpus;
        if (problem_.tenants[tenant].cohort >= 0) cohort_held_[problem_.tenants[tenant].cohort] += gpus;
    }

  private:
    const Problem& problem_;
    bool on_;
    std::vector<double> held_, cohort_held_, cohort_quota_;
};

}  // namespace alto
