//! A bounded number of places, which the newest takes from the oldest; each holds something that
//! is in nobody's hands twice.

use std::collections::BTreeMap;

use crate::sync::{Arc, Mutex, lock};

/// Places, oldest first. Full: the oldest is given notice. `N`, dropped, gives notice; `T` is what
/// a place holds. Clones share the places.
pub struct Places<N, T>(Arc<Mutex<Taken<N, T>>>);

struct Taken<N, T> {
    next: u64,
    oldest_first: BTreeMap<u64, Seat<N, T>>,
}

struct Seat<N, T> {
    _notice: N,
    held: T,
}

/// One of them, given back when it is dropped.
pub struct Place<N, T> {
    all: Places<N, T>,
    number: u64,
}

impl<N, T> Places<N, T> {
    /// A place for `held`, at the cost of the oldest if there are `most`, or if there is nothing to
    /// hold: then it takes over what the oldest held. None: nobody has a place to take it from.
    #[must_use]
    pub fn enter(&self, most: usize, notice: N, held: Option<T>) -> Option<Place<N, T>> {
        let mut evicted = Vec::new();
        let mut taken = lock(&self.0);
        let held = match held {
            Some(held) => held,
            None => {
                let (_, Seat { _notice, held }) = taken.oldest_first.pop_first()?;
                drop(_notice);
                held
            }
        };
        while taken.oldest_first.len() >= most.max(1) {
            evicted.extend(taken.oldest_first.pop_first());
        }
        let number = taken.next;
        taken.next = number.wrapping_add(1);
        taken.oldest_first.insert(number, Seat { _notice: notice, held });
        drop(taken);
        drop(evicted); // giving notice wakes somebody: not under the lock
        Some(Place { all: self.clone(), number })
    }

    /// How many are taken.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.0).oldest_first.len()
    }

    /// Whether none is taken.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn remove(&self, number: u64) -> Option<Seat<N, T>> {
        lock(&self.0).oldest_first.remove(&number)
    }
}

impl<N, T> Place<N, T> {
    /// Gives the place up and takes along what it holds. None where it was taken at the same time.
    #[must_use]
    pub fn leave(self) -> Option<T> {
        self.all.remove(self.number).map(|seat| seat.held)
    }
}

impl<N, T> Drop for Place<N, T> {
    fn drop(&mut self) {
        drop(self.all.remove(self.number));
    }
}

impl<N, T> Clone for Places<N, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<N, T> Default for Places<N, T> {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Taken { next: 0, oldest_first: BTreeMap::new() })))
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::{AtomicBool, AtomicU64, Ordering};
    use loom::thread;

    /// A descriptor: how many are in somebody's hands.
    struct Descriptor(Arc<AtomicU64>);

    impl Descriptor {
        fn of(open: &Arc<AtomicU64>) -> Self {
            open.fetch_add(1, Ordering::AcqRel);
            Self(Arc::clone(open))
        }
    }

    impl Drop for Descriptor {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
    }

    struct Notice(Arc<AtomicBool>);

    impl Drop for Notice {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }

    fn notice() -> (Notice, Arc<AtomicBool>) {
        let given = Arc::new(AtomicBool::new(false));
        (Notice(Arc::clone(&given)), given)
    }

    /// A connection speaks at the moment in which another, for which no descriptor is left, takes
    /// the place of the oldest: one of them has the descriptor, the other knows that it has not.
    #[test]
    fn what_a_place_holds_is_in_one_hand() {
        loom::model(|| {
            let (open, places) = (Arc::new(AtomicU64::new(0)), Places::default());
            let (oldest, was_told) = notice();
            let place = places.enter(2, oldest, Some(Descriptor::of(&open))).unwrap();
            let newcomer = thread::spawn({
                let places = places.clone();
                move || places.enter(2, notice().0, None).and_then(Place::leave)
            });
            let kept = place.leave();
            let taken = newcomer.join().unwrap();
            assert!(kept.is_some() != taken.is_some());
            assert!(was_told.load(Ordering::Acquire), "by the end of its place, whoever ended it");
            assert_eq!(open.load(Ordering::Acquire), 1);
            drop((kept, taken));
            assert_eq!((open.load(Ordering::Acquire), places.len()), (0, 0));
        });
    }

    /// Two connections come, and one goes, where there is one place: never two are taken, and
    /// nothing is left in the end.
    #[test]
    fn places_are_bounded_and_given_back() {
        loom::model(|| {
            let (open, places) = (Arc::new(AtomicU64::new(0)), Places::default());
            let first = places.enter(1, notice().0, Some(Descriptor::of(&open))).unwrap();
            let second = thread::spawn({
                let (places, descriptor) = (places.clone(), Descriptor::of(&open));
                move || {
                    let place = places.enter(1, notice().0, Some(descriptor)).unwrap();
                    assert!(places.len() <= 1);
                    drop(place);
                }
            });
            let third = places.enter(1, notice().0, Some(Descriptor::of(&open))).unwrap();
            assert!(places.len() <= 1);
            drop(first);
            drop(third);
            second.join().unwrap();
            assert_eq!((open.load(Ordering::Acquire), places.len()), (0, 0));
        });
    }
}
