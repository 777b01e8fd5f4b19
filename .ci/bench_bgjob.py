"""bgjob's adapters for the benchmarks beside its peers: through the public interface, but for placing phases."""

import asyncio
import contextlib
import heapq
import logging
from datetime import UTC, datetime

from adapters import Adapter as Base
from stores import Adapter as StoreBase


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
            lane.begin(due - lane.step)
            lane.alarm = due
            engine._heap[n] = due, lane.seq, lane  # one by one, or the memory of a second heap would be counted
        heapq.heapify(engine._heap)
        self.firsts.clear()
        engine._armed = float("inf")
        engine._arm()

    async def stop(self):
        await self.context.__aexit__(None, None, None)


class StoreAdapter(StoreBase):
    name = "bgjob"
    dist = "bgjob"
    modules = ("bgjob",)
    kind = "subject"
    stores = ("sqlite", "redis", "postgres")
    can_ticks = can_calls = True

    def registry(self):
        import bgjob

        logging.getLogger("bgjob").setLevel(logging.CRITICAL)
        return bgjob.Registry()

    def url(self, cfg):
        return f"sqlite:///{cfg['path']}" if cfg["store"] == "sqlite" else cfg["url"]

    async def prepare(self, cfg):
        async with self.registry().running(store=self.url(cfg), jobs=[]):
            pass  # makes the tables

    async def ticks(self, cfg, rec, ready):
        import bgjob

        registry = self.registry()

        async def body(job):
            rec(job, bgjob.current_run().tick.timestamp())

        for job in range(cfg["jobs"]):
            registry.job(every=cfg["period"], name=f"j{job}", args={"job": job})(body)
        async with registry.running(store=self.url(cfg)):
            ready()
            await asyncio.Event().wait()

    def call(self, registry, rec=None):
        @registry.job
        async def call(n: int):
            rec(n)

        return call

    @contextlib.asynccontextmanager
    async def client(self, cfg):
        registry = self.registry()
        call = self.call(registry)

        async def put(n, due):
            if due is None:
                await call.submit(n)
            else:
                await call.at(datetime.fromtimestamp(due, UTC)).submit(n)

        async with registry.running(store=self.url(cfg), jobs=[]):
            yield put

    async def work(self, cfg, rec, ready):
        registry = self.registry()
        self.call(registry, rec)
        async with registry.running(store=self.url(cfg)):
            ready()
            await asyncio.Event().wait()
