-- Who somebody is: the one place that knows the main application's tables of people.
--
-- A deployment may replace it by its own (CREATE OR REPLACE FUNCTION): `sottovoce migrate` then
-- leaves it alone. docs/how-to/take-over.md has two examples. What must stay: the name, the two
-- arguments, the names and types of the columns, LANGUAGE sql, STABLE and one SELECT, so that the
-- planner inlines it and finds the person by an index.
--
-- It is a function and not a view because a view would stop the main application's own
-- ALTER TABLE ... TYPE. Every column is cast, so that such a change does not reach the servers.
--
-- Arguments: of_clerk_id, a session token's `sub`; of_user_id, users.id. One of them is NULL.
-- therapist_ids: the therapists that this person is and may act as, lowest id first.
-- sponsored: somebody else pays, an employer or a group.
CREATE FUNCTION chat_people(of_clerk_id text, of_user_id bigint)
RETURNS TABLE (
    user_id bigint, clerk_id text, email text, first_name text, last_name text, is_active boolean,
    therapist_ids bigint[], therapist_name text, therapist_title text,
    subscription_status text, sponsored boolean
)
LANGUAGE sql STABLE ROWS 1 AS $$
    SELECT u.id::bigint, u.clerk_id::text, coalesce(u.email::text, ''),
           coalesce(u.first_name::text, ''), coalesce(u.last_name::text, ''),
           coalesce(u.is_active::boolean, false),
           ARRAY(SELECT t.id::bigint FROM therapists t
                 WHERE t.user_id = u.id@and_not_deleted@ ORDER BY t.id),
           (SELECT @therapist_name@ FROM therapists t WHERE t.user_id = u.id ORDER BY t.id LIMIT 1),
           (SELECT @therapist_title@ FROM therapists t WHERE t.user_id = u.id ORDER BY t.id LIMIT 1),
           coalesce(u.subscription_status::text, ''),
           @sponsored@
    FROM users u
    WHERE u.clerk_id = of_clerk_id OR u.id = of_user_id
$$;
