//! Manifests as a directory may hold them: any text is read into objects or refused with a fault, and
//! the index takes in whatever was read, as agents will be told.
#![no_main]

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use weft_controller::index::{Index, Settings};
use weft_controller::objects::decode;
use weft_controller::problems::{Origin, Problems};
use weft_controller::source::Event;
use weft_controller::views::Views;
use weft_proto::Resource;

fuzz_target!(|text: &str| {
    let Ok(documents) = decode::documents(text) else {
        return;
    };
    let origin = Origin {
        place: "fuzzed".into(),
        document: None,
    };
    let mut events = BTreeMap::new();
    for document in documents {
        let _ = decode::unsupported(&document);
        let Ok(Some(key)) = decode::identify(&document) else {
            continue;
        };
        let (same, origin) = (key.clone(), origin.clone());
        events.insert(same, Event::read(key, Arc::new(document), origin));
    }
    let views = Arc::new(Views::default());
    let mut index = Index::new(settings(), views.clone(), Problems::default());
    let gone = events.keys().cloned().map(|key| Event::Delete { key });
    let gone: Vec<_> = gone.collect();
    index.apply(events.into_values().collect::<Vec<_>>().into());
    // An agent accepts everything that it is told.
    let told = views.beyond(&"one".parse().expect("a name"), HashMap::new());
    for told in told.changed {
        let resource = told.message().expect("it is one");
        Resource::try_from(resource).expect("agents accept it");
    }
    index.apply(gone.into());
});

fn settings() -> Settings {
    Settings {
        pod_ranges: vec!["10.1.0.0/16".parse().expect("valid")],
        service_ranges: vec!["10.2.0.0/16".parse().expect("valid")],
        ..Settings::default()
    }
}
