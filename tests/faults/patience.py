"""What a watchdog of these tests may do, and from when: a busy machine is slow to load, and that is no hang."""

from eepo_fast.run import watchdog

LOADING_S = 600.0


def watch_from(iteration):
    """The watchdog has the run's timeout from this iteration on, and LOADING_S before."""
    begin, enter = watchdog.Watchdog.__init__, watchdog.Watchdog.enter

    def patient(self, rank, size, store, timeout_s, end):
        self.run_timeout_s = timeout_s
        begin(self, rank, size, store, LOADING_S, end)

    def entering(self, phase):
        if phase.endswith(f" of iteration {iteration}"):
            self.timeout_s = self.run_timeout_s
        enter(self, phase)

    watchdog.Watchdog.__init__, watchdog.Watchdog.enter = patient, entering
