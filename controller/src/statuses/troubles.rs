//! What cannot be said, for `/problems`: of each object of its own, so that what works for one does not hide what fails
//! for another; and of a few only, as when nothing works they all say the same.

use std::collections::BTreeMap;

use crate::objects::ObjectKey;
use crate::problems::{Problem, Problems, Scope};

/// Of which objects, and why. What they are told of ends with it.
#[derive(Debug)]
pub(super) struct Troubles {
    problems: Problems,
    all: Option<String>,
    objects: BTreeMap<ObjectKey, String>,
}

const PLACE: &str = "kubernetes: statuses";
const EFFECT: &str = "what is said on objects is older";
/// So many objects are told of.
const MOST_TOLD: usize = 20;

impl Troubles {
    /// None yet.
    pub(super) fn new(problems: Problems) -> Self {
        Self {
            problems,
            all: None,
            objects: BTreeMap::new(),
        }
    }

    /// Why not all could be looked through; none: they could.
    pub(super) fn of_all(&mut self, failure: Option<String>) {
        let failure = failure.map(|it| format!("not all objects can be looked through: {it}"));
        if self.all != failure {
            self.all = failure;
            self.tell();
        }
    }

    /// Why the status of an object cannot be written; none: it is as it should be.
    pub(super) fn of(&mut self, object: &ObjectKey, failure: Option<String>) {
        let failure = failure.map(|it| format!("its status cannot be written: {it}"));
        if self.objects.get(object) == failure.as_ref() {
            return;
        }
        match failure {
            None => drop(self.objects.remove(object)),
            Some(_) if self.is_full() && !self.objects.contains_key(object) => return,
            Some(reason) => drop(self.objects.insert(object.clone(), reason)),
        }
        self.tell();
    }

    /// Forgets objects of which nothing is to be said any more.
    pub(super) fn keep(&mut self, is_there: impl Fn(&ObjectKey) -> bool) {
        let before = self.objects.len();
        self.objects.retain(|it, _| is_there(it));
        if self.objects.len() < before {
            self.tell();
        }
    }

    fn is_full(&self) -> bool {
        self.objects.len() >= MOST_TOLD
    }

    fn tell(&self) {
        let problem = |object: Option<&ObjectKey>, reason: &String| Problem {
            file: Some(PLACE.to_owned()),
            document: None,
            object: object.map(ToString::to_string),
            field: String::new(),
            reason: reason.clone(),
            effect: EFFECT.to_owned(),
        };
        let all = self.all.iter().map(|reason| problem(None, reason));
        let objects = self.objects.iter();
        let objects = objects.map(|(object, reason)| problem(Some(object), reason));
        let scope = Scope::Source(PLACE.to_owned());
        self.problems.replace(scope, all.chain(objects).collect());
    }
}

impl Drop for Troubles {
    /// Whoever writes next tells of its own.
    fn drop(&mut self) {
        self.problems
            .replace(Scope::Source(PLACE.to_owned()), vec![]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKind;

    fn object(number: usize) -> ObjectKey {
        ObjectKey {
            kind: ObjectKind::Service,
            namespace: Some("shop".parse().expect("valid")),
            name: format!("s{number}").parse().expect("valid"),
        }
    }

    #[test]
    fn what_works_for_one_says_nothing_of_another() {
        let problems = Problems::default();
        let mut troubles = Troubles::new(problems.clone());
        let told = || -> Vec<String> {
            let objects = problems.list().into_iter();
            objects.map(|it| it.object.unwrap_or_default()).collect()
        };
        let names = |numbers: &[usize]| -> Vec<String> {
            numbers.iter().map(|it| object(*it).to_string()).collect()
        };
        troubles.of(&object(1), Some("refused".to_owned()));
        troubles.of(&object(2), Some("refused".to_owned()));
        troubles.of(&object(3), None);
        assert_eq!(told(), names(&[1, 2]));
        troubles.of(&object(1), None);
        assert_eq!(told(), names(&[2]));
        troubles.of_all(Some("no answer".to_owned()));
        assert_eq!(problems.count(), 2);
        troubles.of_all(None);
        troubles.keep(|it| *it != object(2));
        assert_eq!(problems.count(), 0);
        (0..2 * MOST_TOLD).for_each(|it| troubles.of(&object(it), Some("down".to_owned())));
        assert_eq!(problems.count(), MOST_TOLD);
        drop(troubles);
        assert_eq!(problems.count(), 0);
    }
}
