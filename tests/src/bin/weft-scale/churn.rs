//! Changes, as many a second as are wanted, whatever becomes of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use weft_proto::v1::Kind;

use crate::board::Board;
use crate::wire::Short;
use crate::world::{Size, World};

/// What was done.
pub(crate) struct Done {
    pub(crate) changes: usize,
    pub(crate) took: Duration,
    /// How late the latest change was made.
    pub(crate) late: Duration,
}

/// Makes them; blocks until the time is over.
pub(crate) fn run(world: &mut World, size: Size, board: &Board) -> Result<Done> {
    let changes = size.changes_per_second * size.seconds;
    let began = Instant::now();
    let mut late = Duration::ZERO;
    for number in 0..changes {
        let due = began + Duration::from_secs(1) * number as u32 / size.changes_per_second as u32;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let step = world.step().context("there are too few pods")?;
        late = late.max(due.elapsed());
        let endpoint = Short::of(Kind::Endpoint as i32, step.endpoint.as_bytes());
        board.post(endpoint, step.present);
        step.write(&world.store)?;
    }
    Ok(Done {
        changes,
        took: began.elapsed(),
        late,
    })
}
