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
        self.firsts = {}

    def add(self, fn, arg, period, first):
        name = f"job{arg}"
        self.registry.job(every=period, name=name, args={"arg": arg})(fn)
        self.firsts[name] = due = round(first * 1000)
        return due / 1000

    async def start(self):
        self.context = self.registry.running()
        await self.context.__aenter__()
        engine = self.registry._engine
        for lane in engine._lanes.values():
            lane.ticks = lane.grid(self.firsts[lane.spec.name]).ticks(self.firsts[lane.spec.name])
        engine._heap = [(self.firsts[lane.spec.name], lane.seq, lane) for lane in engine._lanes.values()]
        heapq.heapify(engine._heap)
        self.firsts.clear()
        engine._armed = float("inf")
        engine._arm()

    async def stop(self):
        await self.context.__aexit__(None, None, None)
