//! ServiceProfiles in tables.

use std::time::Duration;

use super::*;

fn profile(routes: Vec<ProfileRoute>) -> Profile {
    Profile {
        namespace: name("shop"),
        routes,
        backends: vec![],
        budget: BudgetSettings::DEFAULT,
    }
}

/// One for all that is asked for by GET.
fn gets(reliability: Reliability) -> ProfileRoute {
    ProfileRoute {
        name: "gets".to_owned(),
        condition: Condition::Method(Method::GET),
        reliability,
        classes: None,
    }
}

/// (whether the Service heeds headers, what it says of timeouts, what the profile's route says of them) -> whether
/// headers are heeded, and the timeout, of what is the route's and of what is none's
#[test]
fn whether_headers_are_heeded_is_for_the_service_to_say() {
    let second = Duration::from_secs(1);
    let within = |seconds: Option<u32>| Timeouts {
        request: seconds.map(|it| it * second),
        ..Timeouts::default()
    };
    for (heeds, of_service, of_route, get, post) in [
        (false, None, None, None, None),
        (false, Some(9), None, None, None),
        (false, Some(9), Some(1), Some((false, Some(1))), None),
        (true, None, None, Some((true, None)), Some((true, None))),
        (true, Some(9), None, Some((true, None)), Some((true, None))),
        (
            true,
            Some(9),
            Some(1),
            Some((true, Some(1))),
            Some((true, None)),
        ),
    ] {
        let of_service = Reliability {
            timeouts: within(of_service),
            retry: None,
            heeds_headers: heeds,
        };
        let route = gets(Reliability {
            timeouts: within(of_route),
            ..Reliability::default()
        });
        let profiles = || vec![profile(vec![route.clone()])];
        let of_service = || Some(of_service.clone());
        for table in [
            table(vec![])
                .with_profiles(profiles())
                .with_unrouted(of_service()),
            table(vec![])
                .with_unrouted(of_service())
                .with_profiles(profiles()),
        ] {
            for (method, expected) in [(Method::GET, get), (Method::POST, post)] {
                let said = table.unrouted_for(&name("any"), &method, "/").reliability;
                let said = said.map(|it| (it.heeds_headers, it.timeouts.request));
                let expected =
                    expected.map(|(it, time): (_, Option<u32>)| (it, time.map(|it| it * second)));
                assert_eq!(said, expected, "{heeds} {of_route:?} {method}");
            }
        }
    }
}

#[test]
fn the_budget_is_the_profiles_for_all_requests_that_it_holds_for() {
    let budget = BudgetSettings {
        per_second: 3,
        ..BudgetSettings::DEFAULT
    };
    let of_others = Profile {
        namespace: name("other"),
        budget,
        ..profile(vec![gets(Reliability::default())])
    };
    let table = table(vec![]).with_profiles(vec![of_others]);
    for (client, expected) in [("other", budget), ("any", BudgetSettings::DEFAULT)] {
        for method in [Method::GET, Method::POST] {
            let said = table.unrouted_for(&name(client), &method, "/");
            assert_eq!(said.budget, expected, "{client} {method}");
        }
    }
}
