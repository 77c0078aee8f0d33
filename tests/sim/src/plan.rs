//! The plan of one run: its cluster, its load, and which faults may happen how often. All of it follows from the seed.

use xsan_controlplane::timing::DOWN_OUT_MIN;
use xsan_dataplane::testing::Random;

pub const US: u64 = 1_000;
pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1_000_000_000;

/// The least that an operator may set.
pub const OUT_MIN: u64 = DOWN_OUT_MIN.as_nanos() as u64;
/// Of each host, fast or slow: two differ by no more than what leases bear.
const DRIFT_PPM_MAX: u64 = 250;
const DEVICE_BYTES: u64 = 64 << 20;
/// A device with slots for 32 blocks beside its journal.
const DEVICE_BYTES_FULL: u64 = 34 << 20;

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub nodes: usize,
    pub replica_count: u8,
    pub group_count: u16,
    pub clients: usize,
    /// More clients, each of which only reads one page of a block that its host leads: that of a primary that is cut off goes on for
    /// as long as it is answered.
    pub readers: usize,
    /// Operations that one client has under way.
    pub depth: usize,
    /// Blocks of the volume; few, so that operations meet.
    pub blocks: u32,
    pub cached: bool,
    /// Of each host's capacity; so few in some runs that writes are refused.
    pub device_bytes: u64,
    pub every_write: bool,
    /// Some writes ask for FUA: each makes all that its members have stable.
    pub fua: bool,
    /// Virtual time with faults, in each of the run's parts.
    pub part_ns: u64,
    /// Parts; between two of them the whole cluster loses its power, or (sometimes) is just killed.
    pub parts: u32,
    /// Mean time between faults.
    pub fault_ns: u64,
    pub think_ns: u64,
    pub network_ns: u64,
    pub device_ns: u64,
    /// Capacity takes so many times as long as the cache.
    pub capacity_factor: u64,
    pub drift_ppm: u64,
    /// The operator wants nobody to wait for slow nodes.
    pub demotes: bool,
    pub strike: Strike,
    /// Grants take so much longer than everything else.
    pub grant_ns: u64,
    /// What the control plane agrees on takes up to so much longer.
    pub commit_ns: u64,
    /// A host that is away for so long is left out: its replicas are made elsewhere.
    pub out_ns: u64,
    /// Relative frequency of each kind of fault.
    pub weights: Weights,
}

/// When all hosts go down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strike {
    AnyTime,
    /// Right after something was promised to be on stable media.
    AtPromise,
    /// While a store moves what is in its journal to its place.
    AtDestage,
    /// While a store writes the checkpoint that gives journal space up.
    AtCheckpoint,
    /// When the one that has just been taken in acts alone, because all others were killed.
    WhenAlone,
}

impl Strike {
    /// What it is counted as when its moment comes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AnyTime => "at any time",
            Self::AtPromise => "all hosts down right after a promise",
            Self::AtDestage => "all hosts down during destage",
            Self::AtCheckpoint => "all hosts down at a checkpoint",
            Self::WhenAlone => "all hosts down when the last one taken in acts alone",
        }
    }
}

/// How often each kind of fault is chosen, in parts of their sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weights {
    pub kill_data: u64,
    pub kill_control: u64,
    pub kill_host: u64,
    pub lose_power: u64,
    pub pause: u64,
    pub reset: u64,
    pub partition: u64,
    pub one_way: u64,
    pub takeover: u64,
    pub newcomer: u64,
    pub heal: u64,
    pub slow: u64,
    pub fail_device: u64,
    pub fail_flush: u64,
    pub damage: u64,
    pub add_node: u64,
    pub late_maps: u64,
    pub away: u64,
    pub maintenance: u64,
    pub remove_node: u64,
    pub give_up: u64,
}

impl Plan {
    /// Do its hosts run out of space?
    pub fn is_full(&self) -> bool {
        self.device_bytes == DEVICE_BYTES_FULL
    }

    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut sometimes =
            |percent: u64, weight: u64| if random.chance(percent) { 1 + random.below(weight) } else { 0 };
        // Bit rot and lost power do not meet: together they can take the last good copy of a page.
        let rot = sometimes(35, 6);
        let weights = Weights {
            kill_data: sometimes(80, 10),
            kill_control: sometimes(60, 6),
            kill_host: sometimes(60, 6),
            lose_power: if rot == 0 { sometimes(60, 6) } else { 0 },
            pause: sometimes(50, 6),
            reset: sometimes(70, 10),
            partition: sometimes(50, 6),
            one_way: sometimes(40, 6),
            takeover: 0,
            newcomer: 0,
            heal: 6,
            slow: sometimes(40, 4),
            fail_device: if rot == 0 { sometimes(20, 2) } else { 0 },
            fail_flush: if rot == 0 { sometimes(20, 2) } else { 0 },
            damage: rot,
            add_node: sometimes(20, 2),
            late_maps: sometimes(30, 4),
            away: 0,
            maintenance: 0,
            remove_node: 0,
            give_up: 0,
        };
        let full = random.chance(8);
        let nodes = [3, 3, 3, 4, 5, 6][random.index(6)];
        let grant_ns = if random.chance(25) { 100 * MS + random.below(700 * MS) } else { 0 };
        // Few writes, and long cuts: what one primary has sent arrives after another has taken over, and before its first write.
        let calm = !full && random.chance(10);
        // So much is written that journals are full.
        let wide = !full && !calm && random.chance(12);
        // Many short parts: what a flush covers is only seen when all hosts lose their power.
        let short = !wide && !calm && random.chance(40);
        let cached = !full && random.chance(if wide { 75 } else { 25 });
        let mut weights = weights;
        if grant_ns > 0 || calm {
            // Whose lease seems longer than it is shows only when it is cut off.
            weights.partition += 5;
        }
        if calm {
            weights.heal += 10;
        }
        if wide {
            weights.slow += 5;
        }
        let mut plan = Self {
            seed,
            nodes,
            replica_count: if random.chance(75) { 3 } else { 2 },
            group_count: if calm { 8 } else { 1 << random.below(4) },
            clients: if wide { 4 } else { 1 + random.index(4) },
            readers: random.index(4) + if grant_ns > 0 { 2 } else { 0 },
            depth: if wide { 16 } else { 1 + random.index(8) },
            blocks: if full || wide { 30 + random.below(20) as u32 } else { 1 + random.below(6) as u32 },
            cached,
            device_bytes: if full { DEVICE_BYTES_FULL } else { DEVICE_BYTES },
            every_write: random.chance(15),
            fua: true,
            part_ns: match (short, random.chance(50)) {
                _ if calm => (10 + random.below(20)) * SECOND,
                // Long enough for a slow learner to fall far behind.
                (_, true) if wide => (2 + random.below(3)) * SECOND,
                (_, false) if wide || short => 100 * MS + random.below(700 * MS),
                (true, _) => 2 * MS + random.below(50 * MS),
                (false, _) => (1 + random.below(5)) * SECOND,
            },
            parts: if short { 5 + random.below(8) as u32 } else { 1 + random.below(3) as u32 },
            fault_ns: if calm {
                2 * SECOND
            } else {
                [30 * MS, 150 * MS, 600 * MS, 2 * SECOND][random.index(4)]
            },
            think_ns: match random.index(5) {
                _ if calm => SECOND,
                _ if wide => 0,
                index => [0, 100 * US, 2 * MS, 10 * MS, 200 * MS][index],
            },
            network_ns: [10 * US, 50 * US, 500 * US][random.index(3)],
            device_ns: [15 * US, 80 * US, 1000 * US][random.index(3)],
            capacity_factor: if cached && random.chance(50) { 20 } else { 1 },
            drift_ppm: if random.chance(50) { random.below(DRIFT_PPM_MAX + 1) } else { 0 },
            weights,
            demotes: random.chance(50),
            strike: match random.index(5) {
                _ if wide && random.chance(70) => Strike::AtCheckpoint,
                0 => Strike::AnyTime,
                1 | 2 => Strike::AtPromise,
                3 => Strike::AtDestage,
                _ => Strike::AtCheckpoint,
            },
            grant_ns,
            commit_ns: 0,
            out_ns: 600 * SECOND,
        };
        if plan.replica_count < 3 && rot > 0 {
            // A page that rots could be the only copy: power is lost instead.
            let other = Weights { damage: 0, lose_power: rot, fail_device: 1, fail_flush: 1, ..plan.weights };
            plan.weights = other;
        }
        // Drawn last: the runs of other seeds stay what they were.
        if random.chance(if calm { 60 } else { 25 }) {
            plan.weights.takeover = 5 + random.below(15);
            plan.commit_ns = if random.chance(50) { 400 * MS } else { 0 };
        }
        if plan.weights.damage == 0 && random.chance(20) {
            plan.weights.newcomer = 1 + random.below(10);
        }
        // Of three, one goes on alone only after ten seconds.
        if plan.weights.damage == 0 && plan.replica_count == 2 && random.chance(40) {
            plan.strike = Strike::WhenAlone;
            plan.parts = plan.parts.max(2);
            // What the last one taken in has is to be made stable by nothing but its being taken in.
            plan.fua = random.chance(30);
            plan.every_write &= plan.fua;
            plan.commit_ns = if random.chance(70) { 50 * MS } else { plan.commit_ns };
        }
        if random.chance(15) {
            plan.weights.maintenance = 1 + random.below(6);
        }
        // There is a host to make replicas on.
        let spare = random.chance(20) && !full && !wide;
        if spare {
            plan.nodes = plan.nodes.max(usize::from(plan.replica_count) + 1);
            match random.below(3) {
                0 if plan.weights.damage == 0 => plan.weights.give_up = 1 + random.below(4),
                1 => plan.weights.remove_node = 4 + random.below(8),
                _ => {}
            }
        }
        if spare && !short && random.chance(60) {
            plan.out_ns = OUT_MIN;
            plan.part_ns += 2 * OUT_MIN;
            plan.parts = plan.parts.min(2);
            plan.weights.away = 4 + random.below(8);
        }
        plan
    }
}
