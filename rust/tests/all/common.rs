//! How the laws draw: the same examples in every run, or a deep search.

use proptest::test_runner::{Config, RngSeed};

/// `cases` examples, the same on every machine; `XTOKEN_PROPTEST=deep` draws twenty times as many
/// anew, and what it finds becomes a named test. `PROPTEST_RNG_SEED` sets another seed.
pub fn draws(cases: u32) -> Config {
    let deep = std::env::var("XTOKEN_PROPTEST").is_ok_and(|mode| mode == "deep");
    let mut config = Config {
        cases: if deep { cases * 20 } else { cases },
        failure_persistence: None,
        ..Config::default()
    };
    if !deep && config.rng_seed == RngSeed::Random {
        config.rng_seed = RngSeed::Fixed(0);
    }
    config
}
