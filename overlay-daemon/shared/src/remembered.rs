//! What was worked out once and holds for as long as what it was worked out from: here, that a
//! signature held by one set of keys.

use std::hash::Hash;
use std::num::NonZeroUsize;

use lru::LruCache;

use crate::sync::{Arc, Mutex, lock};

/// Values by key, all of one generation, which only grows. Bounded: past it, the one that was
/// asked for least recently is forgotten, as is what nobody asks for any more, if told to. Clones
/// share what is remembered. Milliseconds are by a clock of the caller's that never goes back.
pub struct Remembered<K: Hash + Eq, V>(Arc<Mutex<Generation<K, V>>>);

struct Generation<K: Hash + Eq, V> {
    number: u64,
    /// Each with when it was put or last asked for, in milliseconds.
    values: LruCache<K, (V, u64)>,
}

impl<K: Hash + Eq, V: Clone> Remembered<K, V> {
    /// Nothing yet, and never more than `most`.
    #[must_use]
    pub fn new(most: NonZeroUsize) -> Self {
        Self(Arc::new(Mutex::new(Generation { number: 0, values: LruCache::new(most) })))
    }

    /// What was worked out for `key` in this generation. The first who asks for a newer one
    /// forgets all of the older; who is still in an older one is told nothing.
    #[must_use]
    pub fn get(&self, generation: u64, key: &K, now_ms: u64) -> Option<V> {
        let mut held = lock(&self.0);
        if held.number < generation {
            held.number = generation;
            held.values.clear();
        }
        if held.number != generation {
            return None;
        }
        let (value, asked) = held.values.get_mut(key)?;
        *asked = now_ms;
        Some(value.clone())
    }

    /// Remembers what was worked out in this generation, unless it is no longer the newest.
    pub fn put(&self, generation: u64, key: K, value: V, now_ms: u64) {
        let mut held = lock(&self.0);
        if held.number == generation {
            held.values.put(key, (value, now_ms));
        }
    }

    /// Forgets what was last asked for before `before_ms`.
    pub fn forget_unused(&self, before_ms: u64) {
        let mut held = lock(&self.0);
        while held.values.peek_lru().is_some_and(|(_, (_, asked))| *asked < before_ms) {
            held.values.pop_lru();
        }
    }
}

impl<K: Hash + Eq, V> Clone for Remembered<K, V> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn a_generation_ends_the_one_before() {
        let memory = Remembered::new(NonZeroUsize::MIN);
        memory.put(1, 'a', 0, 0); // nobody has asked yet
        assert_eq!(memory.get(1, &'a', 0), None);
        memory.put(1, 'a', 1, 0);
        assert_eq!((memory.get(1, &'a', 0), memory.get(2, &'a', 0)), (Some(1), None));
        memory.put(1, 'a', 1, 0);
        memory.put(2, 'a', 2, 0);
        assert_eq!((memory.get(1, &'a', 0), memory.get(2, &'a', 0)), (None, Some(2)), "who is late takes nothing away");
        memory.put(2, 'b', 3, 0);
        assert_eq!((memory.get(2, &'a', 0), memory.get(2, &'b', 0)), (None, Some(3)), "one place");
    }

    /// M: what nobody asks for goes, and what somebody does stays.
    #[test]
    fn what_nobody_asks_for_is_forgotten() {
        let memory = Remembered::new(NonZeroUsize::MIN.saturating_add(2));
        assert_eq!(memory.get(1, &'a', 0), None);
        for (key, at) in [('a', 0), ('b', 1), ('c', 2)] {
            memory.put(1, key, at, at);
        }
        assert_eq!(memory.get(1, &'a', 9), Some(0));
        memory.forget_unused(2);
        assert_eq!(['a', 'b', 'c'].map(|key| memory.get(1, &key, 9)), [Some(0), None, Some(2)]);
        memory.forget_unused(10);
        assert_eq!(['a', 'b', 'c'].map(|key| memory.get(1, &key, 9)), [None; 3]);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::sync::{AtomicU64, Ordering};
    use loom::thread;

    /// Two sessions verify one token, one of them before and after the keys are replaced: what was
    /// found by the old keys is never taken for found by the new.
    #[test]
    fn no_verdict_outlives_its_keys() {
        loom::model(|| {
            let (memory, keys) = (Remembered::new(NonZeroUsize::MIN), Arc::new(AtomicU64::new(1)));
            let verify = {
                let (memory, keys) = (memory.clone(), Arc::clone(&keys));
                move || {
                    let current = keys.load(Ordering::Acquire);
                    let verdict = memory.get(current, &(), 0).unwrap_or_else(|| {
                        memory.put(current, (), current, 0);
                        current
                    });
                    assert_eq!(verdict, current);
                }
            };
            let session = thread::spawn(verify.clone());
            verify();
            keys.store(2, Ordering::Release);
            verify();
            session.join().unwrap();
            assert!(memory.get(2, &(), 0).is_none_or(|verdict| verdict == 2));
        });
    }
}
