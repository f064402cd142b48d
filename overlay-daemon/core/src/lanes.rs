//! What one session still has to send: a bounded queue a class, scheduled by weight.
//!
//! Deficit round robin (Shreedhar and Varghese, SIGCOMM 1995) over bytes, so that a bulk
//! transfer and small messages share a session by weight whatever their sizes
//! (P-5). A full lane refuses; what that means is its pusher's to decide.

use std::collections::VecDeque;

use crate::Millis;
use crate::admission::{TokenBucket, percent};
use crate::frame::{CHUNK, Flags, Frame, HEADER_LEN, MAX_BODY};
use crate::memory::FRAME_BYTES;

/// Which lane a frame waits in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Answers, pings, announcements: small, and others wait for them.
    Control,
    /// Messages that fit one chunk.
    Interactive,
    /// Chunks.
    Bulk,
}

impl Class {
    const ALL: [Self; 3] = [Self::Control, Self::Interactive, Self::Bulk];

    const fn index(self) -> usize {
        match self {
            Self::Control => 0,
            Self::Interactive => 1,
            Self::Bulk => 2,
        }
    }

    /// Bytes that a lane may send more each round: 4 to 2 to 1.
    const fn quantum(self) -> usize {
        const UNIT: usize = 16 * 1024;
        match self {
            Self::Control => 4 * UNIT,
            Self::Interactive => 2 * UNIT,
            Self::Bulk => UNIT,
        }
    }
}

/// Frames of the largest message: its Begin and every chunk.
const LARGEST: usize = 1 + MAX_BODY / CHUNK;

/// Bytes that one lane holds at the most, whatever its depth: eight of the largest messages. By
/// frames alone a lane of chunks would hold 64 MiB, which a slow reader pins in memory.
pub const LANE_BYTES: usize = 8 * MAX_BODY;
/// The most that a frame of a message takes of it: a chunk, its record and its header.
const LARGEST_FRAME: usize = CHUNK + 4_096 + HEADER_LEN;

/// The lane is full: the frame was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lane is full")]
pub struct Full;

/// How a lane's turn ended.
enum Turn {
    /// Nothing left that it may send.
    Idle,
    /// Its share is used up.
    Over,
    /// The batch is full.
    Cut,
}

/// Whose a message between daemons is. Of a lane that has room for more than one of the largest,
/// neither takes more than three quarters: what was accepted here, which nobody else can pass on,
/// finds a place whatever others send to be passed on, and the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Published here.
    Ours,
    /// Came from another daemon.
    Transit,
}

#[derive(Debug)]
struct Queued {
    frame: Frame,
    side: Side,
}

#[derive(Debug, Default)]
struct Lane {
    frames: VecDeque<Queued>,
    bytes: usize,
    /// Of both, what is in transit.
    transit: (usize, usize),
    deficit: usize,
}

impl Lane {
    fn push_back(&mut self, queued: Queued) {
        let len = queued.frame.wire_len();
        self.bytes += len;
        if queued.side == Side::Transit {
            self.transit = (self.transit.0 + 1, self.transit.1 + len);
        }
        self.frames.push_back(queued);
    }

    fn pop_front(&mut self) -> Option<Frame> {
        let Queued { frame, side } = self.frames.pop_front()?;
        let len = frame.wire_len();
        self.bytes -= len;
        if side == Side::Transit {
            self.transit = (self.transit.0 - 1, self.transit.1 - len);
        }
        Some(frame)
    }

    /// Frames and bytes of one side.
    fn of(&self, side: Side) -> (usize, usize) {
        match side {
            Side::Transit => self.transit,
            Side::Ours => (self.frames.len() - self.transit.0, self.bytes - self.transit.1),
        }
    }
}

/// The lanes of one session.
#[derive(Debug)]
pub struct Lanes {
    lanes: [Lane; 3],
    /// What leaves before everything else that waits: one frame a stream that is renewed.
    first: Vec<Frame>,
    depth: usize,
    /// That of the control lane: a smaller depth holds once the lane fits it, or answers that
    /// are on their way would make the session look like one that reads nothing.
    control_depth: usize,
    bytes: usize,
    /// As [`crate::memory`] counts it.
    cost: u64,
    /// Whose turn it is, and whether it has been given its quantum: a turn that the budget
    /// cut short goes on with the next batch.
    turn: usize,
    granted: bool,
    /// Bounds messages and chunks a second between daemons; clients' requests are bounded
    /// where they are made.
    bucket: Option<TokenBucket>,
}

impl Lanes {
    /// Lanes of `depth` frames each; that of chunks takes one whole message in any case.
    #[must_use]
    pub fn new(depth: u32) -> Self {
        let depth = depth as usize;
        Self {
            lanes: Default::default(),
            first: Vec::new(),
            depth,
            control_depth: depth,
            bytes: 0,
            cost: 0,
            turn: 0,
            granted: false,
            bucket: None,
        }
    }

    /// From now on, at most `burst` messages and chunks a second.
    pub fn limit(&mut self, burst: u32, now: Millis) {
        self.bucket = Some(match &self.bucket {
            Some(bucket) => bucket.resized(burst, burst, now),
            None => TokenBucket::new(burst, burst, now),
        });
    }

    /// Whether [`Self::limit`] applies.
    #[must_use]
    pub fn is_limited(&self) -> bool {
        self.bucket.is_some()
    }

    /// Another depth from now on. What a lane holds beyond it is sent, not dropped.
    pub fn resize(&mut self, depth: u32) {
        self.depth = depth as usize;
        self.control_depth = self.control_depth.max(self.depth);
        self.settle();
    }

    fn settle(&mut self) {
        if self.lanes[Class::Control.index()].frames.len() < self.depth {
            self.control_depth = self.depth;
        }
    }

    /// Frames of any message that `class` still takes.
    #[must_use]
    pub fn room(&self, class: Class) -> usize {
        let lane = &self.lanes[class.index()];
        let left = LANE_BYTES.saturating_sub(lane.bytes) / LARGEST_FRAME;
        self.depth_of(class).saturating_sub(lane.frames.len()).min(left)
    }

    /// The same of messages between daemons, on one [`Side`].
    #[must_use]
    pub fn room_for(&self, class: Class, side: Side) -> usize {
        let (frames, bytes) = self.lanes[class.index()].of(side);
        let left = three_quarters(LANE_BYTES).saturating_sub(bytes) / LARGEST_FRAME;
        self.part_of(class).saturating_sub(frames).min(left).min(self.room(class))
    }

    fn depth_of(&self, class: Class) -> usize {
        match class {
            Class::Control => self.control_depth,
            Class::Interactive => self.depth,
            // Or a message of the largest size, taken whole or not at all, would never go.
            Class::Bulk => self.depth.max(LARGEST),
        }
    }

    /// What one side takes of it.
    fn part_of(&self, class: Class) -> usize {
        let part = three_quarters(self.depth_of(class));
        if class == Class::Bulk { part.max(LARGEST) } else { part }
    }

    /// Queues a frame.
    ///
    /// # Errors
    /// [`Full`]; the frame is gone and its pusher knows.
    pub fn push(&mut self, class: Class, frame: Frame) -> Result<(), Full> {
        self.push_for(class, frame, Side::Ours)
    }

    /// Queues a frame of a message between daemons, for which there was [room](Self::room_for).
    ///
    /// # Errors
    /// As [`Self::push`]: the lane is full.
    pub fn push_for(&mut self, class: Class, frame: Frame, side: Side) -> Result<(), Full> {
        let len = frame.wire_len();
        if self.room(class) == 0 || self.lanes[class.index()].bytes + len > LANE_BYTES {
            return Err(Full);
        }
        self.bytes += len;
        self.cost += cost(class, &frame);
        self.lanes[class.index()].push_back(Queued { frame, side });
        Ok(())
    }

    /// Queues the last frame of a stream behind all of it that waits, whatever its lane: what
    /// does moves to the slowest, in its order. Taken past the depth, once a stream.
    pub fn push_last(&mut self, end: Frame) {
        let interactive = std::mem::take(&mut self.lanes[Class::Interactive.index()].frames);
        let (waiting, others): (VecDeque<_>, VecDeque<_>) =
            interactive.into_iter().partition(|queued| queued.frame.corr_id == end.corr_id);
        let deficit = self.lanes[Class::Interactive.index()].deficit;
        let mut interactive = Lane { deficit, ..Lane::default() };
        others.into_iter().for_each(|queued| interactive.push_back(queued));
        self.lanes[Class::Interactive.index()] = interactive;
        self.bytes += end.wire_len();
        self.cost += cost(Class::Bulk, &end);
        let bulk = &mut self.lanes[Class::Bulk.index()];
        waiting.into_iter().for_each(|queued| bulk.push_back(queued));
        bulk.push_back(Queued { frame: end, side: Side::Ours });
    }

    /// Queues a frame before everything that waits, of any lane. Taken past the depth: its
    /// pusher bounds how many there are.
    pub fn push_first(&mut self, frame: Frame) {
        self.bytes += frame.wire_len();
        self.cost += cost(Class::Control, &frame);
        self.first.push(frame);
    }

    /// What waits of stream `from` belongs to stream `to` from now on, its answers excepted.
    pub fn relabel(&mut self, from: u64, to: u64) {
        for Queued { frame, .. } in self.lanes.iter_mut().flat_map(|lane| &mut lane.frames) {
            if frame.corr_id == from && !frame.flags.has(Flags::RESP) {
                frame.corr_id = to;
            }
        }
    }

    /// Takes what to send next: frames of at most `budget` bytes in all, or one that is larger.
    pub fn take(&mut self, budget: usize, now: Millis) -> Vec<Frame> {
        let mut out = std::mem::take(&mut self.first);
        let mut spent = out.iter().map(Frame::wire_len).sum();
        self.bytes -= spent;
        self.cost -= out.iter().map(|frame| cost(Class::Control, frame)).sum::<u64>();
        let mut idle = 0; // turns in a row that had nothing they may send
        while idle < Class::ALL.len() {
            match self.take_turn(budget, now, &mut spent, &mut out) {
                Turn::Cut => break,
                Turn::Idle => idle += 1,
                Turn::Over => idle = 0,
            }
            self.turn = (self.turn + 1) % Class::ALL.len();
            self.granted = false;
        }
        self.settle();
        out
    }

    fn take_turn(&mut self, budget: usize, now: Millis, spent: &mut usize, out: &mut Vec<Frame>) -> Turn {
        let class = Class::ALL[self.turn];
        let lane = &mut self.lanes[self.turn];
        if !self.granted {
            lane.deficit += class.quantum();
            self.granted = true;
        }
        while let Some(len) = lane.frames.front().map(|queued| queued.frame.wire_len()) {
            if len > lane.deficit {
                return Turn::Over;
            }
            if *spent > 0 && *spent + len > budget {
                return Turn::Cut;
            }
            if class != Class::Control && self.bucket.as_mut().is_some_and(|bucket| !bucket.take(now)) {
                break;
            }
            let Some(frame) = lane.pop_front() else { break };
            lane.deficit -= len;
            self.bytes -= len;
            self.cost -= cost(class, &frame);
            *spent += len;
            out.push(frame);
        }
        // Empty, or held by the bucket: what it did not use is not saved for a burst.
        lane.deficit = 0;
        Turn::Idle
    }

    /// When something that waits for the bucket may go; nothing if nothing does.
    #[must_use]
    pub fn poll_timeout(&self, now: Millis) -> Option<Millis> {
        let bucket = self.bucket.as_ref()?;
        self.has_messages().then(|| now.after(bucket.wait_ms(now).max(1)))
    }

    /// Frames queued.
    #[must_use]
    pub fn len(&self) -> usize {
        self.first.len() + self.lanes.iter().map(|lane| lane.frames.len()).sum::<usize>()
    }

    /// Whether nothing is queued.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes queued.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What is queued, as [`crate::memory`] counts it.
    #[must_use]
    pub fn cost(&self) -> u64 {
        self.cost
    }

    /// Whether messages are queued, or chunks.
    #[must_use]
    pub fn has_messages(&self) -> bool {
        self.lanes[1..].iter().any(|lane| !lane.frames.is_empty())
    }

    /// What the control lane holds, as [`crate::memory`] counts it: of a client, its answers.
    #[must_use]
    pub fn unread(&self) -> u64 {
        let lane = &self.lanes[Class::Control.index()];
        lane.frames.len() as u64 * FRAME_BYTES + lane.bytes as u64
    }

    /// How full the fullest of the lanes for messages and chunks is for what is published here,
    /// 0 to 100: of its part, or of what is left of the lane.
    #[must_use]
    pub fn percent(&self) -> u8 {
        let of = |ours: usize, transit: usize, part: usize, all: usize| {
            percent(ours as u64, part.min(all.saturating_sub(transit)) as u64)
        };
        let full = |class: Class| {
            let lane = &self.lanes[class.index()];
            let ((frames, bytes), transit) = (lane.of(Side::Ours), lane.transit);
            let by_bytes = of(bytes, transit.1, three_quarters(LANE_BYTES), LANE_BYTES);
            of(frames, transit.0, self.part_of(class), self.depth_of(class)).max(by_bytes)
        };
        full(Class::Interactive).max(full(Class::Bulk))
    }
}

fn three_quarters(all: usize) -> usize {
    all - all / 4
}

/// A message's payload is shared by every queue that it waits in, and counted where it is kept.
fn cost(class: Class, frame: &Frame) -> u64 {
    let own = if class == Class::Control { frame.payload.len() + frame.cap.len() } else { 0 };
    FRAME_BYTES + own as u64
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::frame::AppProto;
    use crate::identity::TenantId;

    const BATCH: usize = 256 * 1024;

    fn frame(len: usize) -> Frame {
        Frame::new(Flags::EVENT, AppProto::PUBSUB, TenantId(0), 1, Bytes::from(vec![0; len]))
    }

    /// I-5: full is refused, and what was refused is not kept.
    /// I-5: messages of one side leave a quarter of a lane to the other, by frames and by bytes;
    /// and what writes wait for is as full as what is left for them.
    #[test]
    fn g1_neither_side_takes_all_of_a_lane() {
        let frame =
            |bytes: usize| Frame::new(Flags::REQ, AppProto::GOSSIP, TenantId(0), 1, Bytes::from(vec![0; bytes]));
        for (class, depth, bytes) in
            [(Class::Interactive, 8, 10), (Class::Interactive, 1_024, 10), (Class::Bulk, 1_024, CHUNK)]
        {
            for (side, other) in [(Side::Ours, Side::Transit), (Side::Transit, Side::Ours)] {
                let mut lanes = Lanes::new(depth);
                let fill = |lanes: &mut Lanes, side| {
                    let mut pushed = 0;
                    while lanes.room_for(class, side) > 0 {
                        lanes.push_for(class, frame(bytes), side).unwrap();
                        pushed += 1;
                    }
                    pushed
                };
                let (first, second) = (fill(&mut lanes, side), fill(&mut lanes, other));
                assert!((2 * second..=4 * second).contains(&first), "{class:?} {depth}: {first} and {second}");
                assert_eq!((lanes.room(class) <= 1, lanes.percent() >= 95), (true, true), "{class:?} {depth}");
                let sent = lanes.take(usize::MAX, Millis(0)).len();
                assert!(sent > 0 && (sent < first || lanes.percent() < 100));
                while !lanes.is_empty() {
                    lanes.take(usize::MAX, Millis(0));
                }
                assert_eq!((lanes.percent(), fill(&mut lanes, side)), (0, first), "given back");
            }
        }
        let mut lanes = Lanes::new(8);
        assert!([Side::Ours, Side::Transit].iter().all(|side| lanes.room_for(Class::Bulk, *side) >= LARGEST));
        (0..6).for_each(|_| lanes.push_for(Class::Interactive, frame(1), Side::Transit).unwrap());
        assert_eq!(lanes.percent(), 0, "two places are left for writes");
    }

    #[test]
    fn a_full_lane_refuses() {
        let mut lanes = Lanes::new(2);
        assert_eq!([1, 2, 3].map(|_| lanes.push(Class::Interactive, frame(10)).is_ok()), [true, true, false]);
        assert_eq!((lanes.len(), lanes.bytes(), lanes.room(Class::Control)), (2, 96, 2));
        assert_eq!(lanes.take(usize::MAX, Millis(0)).len(), 2);
        assert_eq!((lanes.len(), lanes.bytes(), lanes.percent()), (0, 0, 0));
    }

    /// I-5, S1: a lane is bounded in bytes too, and takes the largest message in any case.
    #[test]
    fn s1_a_lane_is_bounded_in_bytes() {
        let mut lanes = Lanes::new(65_536);
        let taken = (0..1_000).filter(|_| lanes.push(Class::Bulk, frame(CHUNK)).is_ok()).count();
        assert!((100..=128).contains(&taken), "{taken}");
        assert!(lanes.bytes() <= LANE_BYTES && lanes.percent() >= 95 && lanes.room(Class::Bulk) == 0);
        assert_eq!(lanes.cost(), taken as u64 * FRAME_BYTES, "what is shared is counted elsewhere");
        assert!(lanes.push(Class::Control, frame(10)).is_ok(), "each lane on its own");
        while !lanes.take(BATCH, Millis(0)).is_empty() {}
        assert_eq!((lanes.bytes(), lanes.cost(), lanes.percent()), (0, 0, 0));
        assert!(lanes.room(Class::Bulk) >= LARGEST);
    }

    /// G8: shares follow the weights within 5%, whatever the frames' sizes.
    #[test]
    fn shares_follow_weights() {
        let mut lanes = Lanes::new(90_000);
        for (class, len, count) in
            [(Class::Control, 1_000, 6_000), (Class::Interactive, 64, 30_000), (Class::Bulk, 65_536, 80)]
        {
            (0..count).for_each(|_| lanes.push(class, frame(len)).unwrap());
        }
        let mut bytes = [0_usize; 3];
        for sent in (0..24).flat_map(|_| lanes.take(256 * 1024, Millis(0))) {
            let lane = match sent.payload.len() {
                1_000 => 0,
                64 => 1,
                _ => 2,
            };
            bytes[lane] += sent.wire_len();
        }
        assert!(lanes.lanes.iter().all(|lane| !lane.frames.is_empty()), "all were contending");
        let share = |lane: usize| bytes[lane] * 100 / bytes.iter().sum::<usize>();
        assert!(share(0).abs_diff(57) <= 5 && share(1).abs_diff(29) <= 5 && share(2).abs_diff(14) <= 5, "{bytes:?}");
    }

    #[test]
    fn the_bucket_holds_messages_but_not_control() {
        let mut lanes = Lanes::new(100);
        lanes.limit(10, Millis(0));
        for _ in 0..20 {
            lanes.push(Class::Interactive, frame(1)).unwrap();
            lanes.push(Class::Control, frame(2)).unwrap();
        }
        assert_eq!(lanes.take(usize::MAX, Millis(0)).len(), 30);
        assert_eq!(lanes.poll_timeout(Millis(0)), Some(Millis(100)));
        assert_eq!(lanes.take(usize::MAX, Millis(100)).len(), 1);
    }

    #[test]
    fn a_frame_of_the_largest_size_leaves() {
        let mut lanes = Lanes::new(4);
        lanes.push(Class::Bulk, frame(crate::frame::MAX_FRAME - 38)).unwrap();
        assert_eq!(lanes.take(1, Millis(0)).len(), 1, "though it is past budget and quantum");
    }
}
