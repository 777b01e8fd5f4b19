"""bgjob's adapter for the benchmarks that measure it beside its peers: the public interface, but for placing phases."""

import heapq
import logging

from adapters import Adapter as Base


class Adapter(Base):
    name = "bgjob"
    dist = "bgjob"
    modules = ("bgjob",)
    kind = "subject"
    min_period = 0.001

    async def setup(self):
        import bgjob

        logging.getLogger("bgjob").setLevel(logging.CRITICAL)
        self.registry = bgjob.Registry()
        self.firsts = []

    def add(self, fn, arg, period, first):
        self.registry.job(every=period, name=f"job{arg}", args={"arg": arg})(fn)
        due = round(first * 1000)
        self.firsts.append(due)
        return due / 1000

    async def start(self):
        self.context = self.registry.running()
        await self.context.__aenter__()
        engine = self.registry._engine
        for n, (lane, due) in enumerate(zip(engine._lanes.values(), self.firsts, strict=True)):
            engine._heap[n] = due, lane.seq, lane  # one by one, or the memory of a second heap would be counted
        heapq.heapify(engine._heap)
        self.firsts.clear()
        engine._armed = float("inf")
        engine._arm()

    async def stop(self):
        await self.context.__aexit__(None, None, None)
